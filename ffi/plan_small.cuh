// plan of few assignments by one block.

#ifndef JAX_MOE_EP_PLAN_SMALL_CUH_
#define JAX_MOE_EP_PLAN_SMALL_CUH_

#include "plan_groups.cuh"
#include "plan_place.cuh"

namespace jax_moe_ep {
namespace {

constexpr int kSmallThreads = 1024;
constexpr int kSmallWarps = kSmallThreads / kWarpSize;
constexpr int kSmallCounters = 8 * 1024;  // 32 KB, and three arrays of 4: 48 KB need no opt-in
constexpr int kSmallExperts = 1024;
constexpr int kSmallRounds = 8;  // the most assignments of a lane

// Warps of each source rank, 0 for none: as many as run, and have counters.
inline int WarpsPerRank(const PlanShape& shape) {
  int warps = kSmallCounters / shape.num_experts;
  return (warps < kSmallWarps ? warps : kSmallWarps) / shape.num_ranks;
}

// A team for LayoutRank: one warp.
struct LayoutWarp {
  const int32_t* totals;  // of the rank's experts
  int num_local;

  __device__ int num_items() const { return (num_local + kWarpSize - 1) / kWarpSize; }
  __device__ int Expert(int item) const {
    int expert = item * kWarpSize + threadIdx.x % kWarpSize;
    return expert < num_local ? expert : -1;
  }
  __device__ int32_t Demand(int item) const { return Expert(item) < 0 ? 0 : totals[Expert(item)]; }
  __device__ bool IsFirst() const { return threadIdx.x % kWarpSize == 0; }

  template <typename Value>
  __device__ int32_t Sum(Value value) const {
    int32_t sum = 0;
#pragma unroll 1
    for (int i = 0; i < num_items(); ++i) {
      if (Expert(i) >= 0) sum += value(i);
    }
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, mask);
    }
    return sum;
  }

  __device__ void ExclusiveSum(int32_t value, int32_t& start, int32_t& total) const {
    int lane = threadIdx.x % kWarpSize;
    int32_t sum = value;
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      int32_t before = __shfl_up_sync(kAllLanes, sum, distance);
      if (lane >= distance) sum += before;
    }
    start = sum - value;
    total = __shfl_sync(kAllLanes, sum, kWarpSize - 1);
  }
};

// A warp's assignments, in registers: the experts, or -1.
struct SmallItems {
  WarpRange range;
  int experts[kSmallRounds];

  // None yet.
  __device__ explicit SmallItems(const PlanParams& p) : range(p, Source(p), Warp() % p.grid.warps) {
    if (Source(p) >= p.shape.num_ranks) range.end = range.begin;
    Clear();
  }

  __device__ static int Warp() { return threadIdx.x / kWarpSize; }
  // The rank whose they are; from R on there is none.
  __device__ static int Source(const PlanParams& p) { return Warp() / p.grid.warps; }

  __device__ int64_t Index(int i) const {
    return range.begin + i * kWarpSize + threadIdx.x % kWarpSize;
  }

  __device__ void Clear() {
#pragma unroll
    for (int i = 0; i < kSmallRounds; ++i) experts[i] = -1;
  }

  // p.arrays.ids begins with assignment `first`. All loads are under way at once.
  __device__ void Load(const PlanParams& p, int64_t first) {
#pragma unroll
    for (int i = 0; i < kSmallRounds; ++i) {
      if (Index(i) < range.end) experts[i] = LoadItem<false>(p, Index(i) - first).expert;
    }
  }

  // counters[expert] += those of the expert.
  __device__ void Count(int32_t* counters) const {
#pragma unroll
    for (int i = 0; i < kSmallRounds; ++i) {
      if (experts[i] >= 0) atomicAdd(&counters[experts[i]], 1);
    }
  }

  // As PlaceWarp.
  __device__ void Place(const PlanParams& p, int32_t* counters) const {
#pragma unroll
    for (int i = 0; i < kSmallRounds; ++i) {
      if (range.begin + i * kWarpSize >= range.end) break;
      Item item{experts[i], false, true};
      PlaceItems<false>(p, item, Index(i), range.end, counters);
    }
  }
};

struct SmallPlanMemory {
  int32_t counters[kSmallCounters];  // [warps, E]
  int32_t totals[kSmallExperts], caps[kSmallExperts], starts[kSmallExperts];

  // All threads; then __syncthreads.
  __device__ void ZeroCounters(const PlanParams& p) {
    FillZero(counters, p.shape.num_ranks * p.grid.warps * p.shape.num_experts);
  }
};

// counters[warp][expert] -> the expert's count in the warps before; totals[expert] = in all.
__device__ void ScanWarps(const PlanParams& p, int num_warps, int32_t* counters) {
  int experts = p.shape.num_experts;
  for (int expert = threadIdx.x; expert < experts; expert += kSmallThreads) {
    int32_t running = 0;
#pragma unroll 8
    for (int warp = 0; warp < num_warps; ++warp) {
      int32_t here = counters[warp * experts + expert];
      counters[warp * experts + expert] = running;
      running += here;
    }
    p.totals[expert] = running;
  }
}

inline PlanParams SmallPlanParams(const PlanShape& shape,
                                  const PlanOptions& options,
                                  const PlanArrays& arrays) {
  return {shape, options, PlanGrid(shape, WarpsPerRank(shape), 1), arrays};
}

// The steps of plan.cu by position, with all that lies between them in shared memory, its counters
// zero; each source rank has grid.warps of the warps, and each rank one that lays it out. A block
// of kSmallThreads, whose warps hold all items; one thread calls meanwhile() once all do.
template <typename Meanwhile>
__device__ void PlanByBlock(const PlanParams& given,
                            SmallPlanMemory& memory,
                            const SmallItems& items,
                            Meanwhile meanwhile) {
  PlanParams p = given;
  p.totals = memory.totals;
  p.caps = memory.caps;
  p.arrays.group_starts = memory.starts;
  int warp = SmallItems::Warp(), experts = p.shape.num_experts;
  int num_ranks = p.shape.num_ranks, num_local = experts / num_ranks;
  int32_t* mine = memory.counters + warp * experts;

  items.Count(mine);
  __syncthreads();
  ScanWarps(p, num_ranks * p.grid.warps, memory.counters);
  __syncthreads();
  if (warp < num_ranks) {
    LayoutWarp team{memory.totals + warp * num_local, num_local};
    LayoutRank(p, team, warp, [](int32_t) {});
  } else if (threadIdx.x == kSmallThreads - 1) {
    meanwhile();
  }
  if (warp == num_ranks % kSmallWarps) {  // one that is free, if there is one
    LayoutWarp team{memory.totals + p.shape.rank * num_local, num_local};
    WriteTotals(p, team, CapOf(p, team));
  }
  __syncthreads();
  for (int source = 0; source < num_ranks; ++source) {
    const int32_t* before = memory.counters + source * p.grid.warps * experts;
    const int32_t* after =
        source + 1 == num_ranks ? memory.totals : before + p.grid.warps * experts;
    WriteSourceCounts<false>(p, source, before, after);
  }
  for (int local = threadIdx.x; local < num_local; local += kSmallThreads) {
    given.arrays.group_starts[local] = memory.starts[local];
  }
  __syncthreads();
  items.Place(p, mine);
}

}  // namespace
}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_PLAN_SMALL_CUH_
