// What plan's kernels share: how assignments are cut, scratch, one assignment.

#ifndef JAX_MOE_EP_PLAN_PARAMS_CUH_
#define JAX_MOE_EP_PLAN_PARAMS_CUH_

#include "divide.h"
#include "plan.h"
#include "rows.cuh"

namespace jax_moe_ep {
namespace {

constexpr int kMaxWarps = 8;             // of a Count or Place block
constexpr int kMaxCounters = 12 * 1024;  // of a Place block: 48 KB, which needs no opt-in
constexpr int kItemsPerWarp = 64;        // two rounds: enough blocks at 64 Ki assignments
constexpr int kMaxChunks = 1024;         // bounds scratch; chunks grow with N beyond
constexpr int kLayoutThreads = 1024;
constexpr int kExpertsPerThread = kMaxExperts / kLayoutThreads;
constexpr int kDigits = 256;
constexpr int kDigitBits = 8;
constexpr int kKeyBits = 32;

// How the assignments are cut, and where things are in scratch.
struct PlanGrid {
  int num_bins;         // of the last Count: E by position, 2E by priority
  int warps;            // of a chunk
  int chunks_per_rank;  // chunks of one source rank
  int64_t items_per_warp;
  int num_chunks;

  PlanGrid(const PlanShape& shape, int warps, int chunks_per_rank)
      : num_bins(shape.num_experts * (shape.by_priority ? 2 : 1)),
        warps(warps),
        chunks_per_rank(chunks_per_rank),
        num_chunks(chunks_per_rank * shape.num_ranks) {
    int64_t items = CeilDiv(shape.assignments_per_rank, int64_t{warps} * chunks_per_rank);
    items_per_warp = CeilDiv(items, kWarpSize) * kWarpSize;
  }

  // For blocks of one chunk each.
  static PlanGrid OfBlocks(const PlanShape& shape) {
    int bins = shape.num_experts * (shape.by_priority ? 2 : 1), warps = kMaxWarps;
    while (warps > 1 && warps * bins > kMaxCounters) warps /= 2;
    int wanted = CeilDiv(shape.assignments_per_rank, int64_t{warps} * kItemsPerWarp);
    int most = kMaxChunks / shape.num_ranks;
    int chunks = wanted < most ? wanted : most;
    return {shape, warps, chunks < 1 ? 1 : chunks};
  }
};

struct PlanParams {
  PlanShape shape;
  PlanOptions options;
  PlanGrid grid;
  PlanArrays arrays;
  // Scratch.
  int32_t* chunk_counts = nullptr;  // [num_chunks, num_bins], after Scan: in the chunks before
  int32_t* totals = nullptr;        // [num_bins]
  int32_t* caps = nullptr;          // [E] the most rows the expert keeps
  uint32_t* thresholds = nullptr;   // [E] by priority: the key at the border
  int32_t* quotas = nullptr;        // [E] by priority: how many with that key stay
  int32_t* digits = nullptr;        // [E, kDigits] by priority: a histogram

  // This rank's first assignment.
  __device__ int64_t first_own() const { return int64_t{shape.rank} * shape.assignments_per_rank; }
};

// Carves scratch; with a null base it only measures. Returns the words used.
inline int64_t CarveScratch(int32_t* base, PlanParams& params) {
  int64_t used = 0;
  auto take = [&](int64_t size) {
    int32_t* start = base ? base + used : nullptr;
    used += size;
    return start;
  };
  int64_t bins = params.grid.num_bins, experts = params.shape.num_experts;
  params.chunk_counts = take(params.grid.num_chunks * bins);
  params.totals = take(bins);
  params.caps = take(experts);
  if (params.shape.by_priority) {
    params.thresholds = reinterpret_cast<uint32_t*>(take(experts));
    params.quotas = take(experts);
    params.digits = take(experts * kDigits);
  }
  return used;
}

// Orders like the float, NaN last: a higher key stays longer. Never 0xffffffff.
__device__ inline uint32_t PriorityKey(float priority) {
  if (isnan(priority)) return 0;
  uint32_t bits = __float_as_uint(priority + 0.0f);  // + 0: -0 ties with +0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// One assignment: its expert, or none; and by priority on which side of the threshold it is.
struct Item {
  int expert = -1;
  bool is_above = false;
  bool is_equal = false;
};

template <bool kSelected>
__device__ Item LoadItem(const PlanParams& p, int64_t index) {
  Item item;
  int id = p.arrays.ids[index];
  if (id < 0 || id >= p.shape.num_experts) return item;
  item.expert = id;
  if constexpr (kSelected) {
    uint32_t key = PriorityKey(p.arrays.priority[index]);
    item.is_above = key > p.thresholds[id];
    item.is_equal = key == p.thresholds[id];
  } else {
    item.is_equal = true;
  }
  return item;
}

// The bin of an item, -1 for none. kSelected: the second round, with two bins an expert.
template <bool kSelected>
__device__ int BinOf(const Item& item) {
  if constexpr (!kSelected) return item.expert;
  if (item.expert < 0 || !(item.is_above || item.is_equal)) return -1;
  return 2 * item.expert + item.is_equal;
}

// Rows that stay out of the first `counts` of an expert's bins.
template <bool kSelected>
__device__ int LiveRows(const PlanParams& p, const int32_t* counts, int expert) {
  if constexpr (!kSelected) return min(counts[expert], p.caps[expert]);
  return counts[2 * expert] + min(counts[2 * expert + 1], p.quotas[expert]);
}

// The assignments of one warp of a chunk.
struct WarpRange {
  int64_t begin, end;
  __device__ WarpRange(const PlanParams& p, int chunk, int warp) {
    int rank = chunk / p.grid.chunks_per_rank;
    int64_t warp_of_rank = int64_t{chunk % p.grid.chunks_per_rank} * p.grid.warps + warp;
    int64_t first = int64_t{rank} * p.shape.assignments_per_rank;
    int64_t last = first + p.shape.assignments_per_rank;
    begin = min(first + warp_of_rank * p.grid.items_per_warp, last);
    end = min(begin + p.grid.items_per_warp, last);
  }
};

inline int Blocks(const PlanParams& params, int wanted) {
  return wanted < params.options.num_sms ? wanted : params.options.num_sms;
}

}  // namespace
}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_PLAN_PARAMS_CUH_
