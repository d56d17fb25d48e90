// The rows that must be zero, found in parallel.

#ifndef JAX_MOE_EP_ROWS_CUH_
#define JAX_MOE_EP_ROWS_CUH_

#include "rows.h"
#include "vec.cuh"

namespace jax_moe_ep {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// Calls visit(row) for padding rows and, with a zero tail, for tail rows. Each such row is visited
// by one lane of one worker warp; lanes without a row visit -1, so that visit may be collective.
//
// Padding is searched over (r, group), r < A, in which row r of a group's padding is live or not:
// neighbouring lanes look at neighbouring groups, so that work spreads evenly over workers.
template <typename Visit>
__device__ void ForEachZeroRow(const RowsPlan& plan,
                               int64_t worker,
                               int64_t num_workers,
                               Visit visit) {
  int lane = threadIdx.x % kWarpSize;
  int64_t stride = num_workers * kWarpSize;
  int64_t candidates = int64_t{plan.num_groups} * plan.alignment;
  for (int64_t base = worker * kWarpSize; base < candidates; base += stride) {
    int64_t i = base + lane, row = -1;
    if (i < candidates) {
      int group = static_cast<int>(i % plan.num_groups);
      int64_t unused = plan.group_counts[group] + i / plan.num_groups;
      if (unused < plan.group_sizes[group]) row = plan.group_starts[group] + unused;
    }
    visit(row);
  }
  if (!plan.zero_tail) return;
  int last = plan.num_groups - 1;
  int64_t end = plan.group_starts[last] + plan.group_sizes[last];
  for (int64_t base = end + worker * kWarpSize; base < plan.capacity; base += stride) {
    visit(base + lane < plan.capacity ? base + lane : -1);
  }
}

// The same, with a warp storing 16 zero bytes a lane.
__device__ inline void ZeroRowsByWarp(
    const RowsPlan& plan, char* rows, int64_t row_bytes, int64_t worker, int64_t num_workers) {
  int lane = threadIdx.x % kWarpSize;
  ForEachZeroRow(plan, worker, num_workers, [&](int64_t row) {
    unsigned lanes = __ballot_sync(kAllLanes, row >= 0);
    for (; lanes != 0; lanes &= lanes - 1) {
      int64_t target = __shfl_sync(kAllLanes, row, __ffs(lanes) - 1);
      uint4* out = reinterpret_cast<uint4*>(rows + target * row_bytes);
#pragma unroll 4
      for (int64_t i = lane; i < row_bytes / kVecBytes; i += kWarpSize) {
        out[i] = make_uint4(0, 0, 0, 0);
      }
    }
  });
}

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_ROWS_CUH_
