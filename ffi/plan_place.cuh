// plan: the place of each assignment among those of its expert, and what follows from it.

#ifndef JAX_MOE_EP_PLAN_PLACE_CUH_
#define JAX_MOE_EP_PLAN_PLACE_CUH_

#include "plan_params.cuh"

namespace jax_moe_ep {
namespace {

__device__ inline void FillZero(int32_t* values, int size) {
  for (int i = threadIdx.x; i < size; i += blockDim.x) values[i] = 0;
}

// A warp places 32 assignments in order, one a lane; `index` is the lane's, and those from `end` on
// are none. counters: the warp's own, for each bin the number of assignments before; they move on.
template <bool kSelected>
__device__ void PlaceItems(
    const PlanParams& p, const Item& item, int64_t index, int64_t end, int32_t* counters) {
  int lane = threadIdx.x % kWarpSize;
  int num_local = p.shape.num_experts / p.shape.num_ranks;
  unsigned before = (1u << lane) - 1;
  unsigned same = __match_any_sync(kAllLanes, item.expert);
  unsigned above = same & __ballot_sync(kAllLanes, item.is_above);
  unsigned equal = same & __ballot_sync(kAllLanes, item.is_equal);

  int place = -1;  // among the rows that stay
  if (item.expert >= 0) {
    int equal_bin = kSelected ? 2 * item.expert + 1 : item.expert;
    int equal_before = counters[equal_bin] + __popc(equal & before);
    int quota = kSelected ? p.quotas[item.expert] : p.caps[item.expert];
    place = min(equal_before, quota);
    if (kSelected) place += counters[2 * item.expert] + __popc(above & before);
    if (!item.is_above && !(item.is_equal && equal_before < quota)) place = -1;
  }
  __syncwarp();  // all lanes have read before one lane of each expert writes
  if (item.expert >= 0 && (same & before) == 0) {
    counters[kSelected ? 2 * item.expert + 1 : item.expert] += __popc(equal);
    if (kSelected) counters[2 * item.expert] += __popc(above);
  }
  __syncwarp();
  if (index >= end) return;

  int owner = place >= 0 ? item.expert / num_local : -1;
  bool is_mine = owner == p.shape.rank;
  p.arrays.slots[index] =
      is_mine ? p.arrays.group_starts[item.expert - owner * num_local] + place : -1;
  int64_t own = index - p.first_own();
  if (own >= 0 && own < p.shape.assignments_per_rank) p.arrays.owners[own] = owner;
}

// One warp places its assignments in order.
template <bool kSelected>
__device__ void PlaceWarp(const PlanParams& p, const WarpRange& range, int32_t* counters) {
#pragma unroll 1
  for (int64_t base = range.begin; base < range.end; base += kWarpSize) {
    int64_t index = base + threadIdx.x % kWarpSize;
    Item item;
    if (index < range.end) item = LoadItem<kSelected>(p, index);
    PlaceItems<kSelected>(p, item, index, range.end, counters);
  }
}

// Live rows of each local expert from one source rank: bins before its assignments, and after.
template <bool kSelected>
__device__ void WriteSourceCounts(const PlanParams& p,
                                  int source,
                                  const int32_t* before,
                                  const int32_t* after) {
  int num_local = p.shape.num_experts / p.shape.num_ranks;
  for (int local = threadIdx.x; local < num_local; local += blockDim.x) {
    int expert = p.shape.rank * num_local + local;
    p.arrays.source_counts[source * num_local + local] =
        LiveRows<kSelected>(p, after, expert) - LiveRows<kSelected>(p, before, expert);
  }
}

}  // namespace
}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_PLAN_PLACE_CUH_
