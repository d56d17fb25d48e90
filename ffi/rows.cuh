// The rows that must be zero, found in parallel.

#ifndef JAX_MOE_EP_ROWS_CUH_
#define JAX_MOE_EP_ROWS_CUH_

#include "divide.h"
#include "ptx.cuh"
#include "rows.h"
#include "vec.cuh"

namespace jax_moe_ep {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// Loads the kernels of both paths, the one with bulk copies where it runs.
template <typename Vector, typename Bulk>
cudaError_t LoadKernels(Vector* vector, Bulk* bulk, int64_t bulk_shared_bytes) {
  LaunchLimits limits;
  if (cudaError_t status = GetLaunchLimits(1, false, &limits); status != cudaSuccess) return status;
  cudaFuncAttributes attributes;
  cudaError_t status = cudaFuncGetAttributes(&attributes, vector);
  if (status != cudaSuccess || !limits.has_bulk_copy) return status;
  return cudaFuncSetAttribute(
      bulk, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bulk_shared_bytes));
}

// The padding rows and, with a zero tail, the tail rows, divided among worker warps: each is found
// by one of them. All lanes call.
//
// Padding is searched over (r, group), r < A, in which row r of a group's padding is live or not.
// Neighbours are left to different workers, so that few rows are shared by many.
class ZeroRows {
 public:
  __device__ ZeroRows(const RowsPlan& plan, int64_t worker, int64_t num_workers)
      : plan_(plan),
        candidates_(int64_t{plan.num_groups} * plan.alignment),
        padding_(worker),
        tail_(worker),
        num_workers_(num_workers) {}

  // The warp's next row, the same for all lanes; false when there are no more.
  __device__ bool Next(int64_t* row) {
    while (lanes_ == 0) {
      if (!NextOfLanes(&found_)) return false;
      lanes_ = __ballot_sync(kAllLanes, found_ >= 0);
    }
    *row = __shfl_sync(kAllLanes, found_, __ffs(lanes_) - 1);
    lanes_ &= lanes_ - 1;
    return true;
  }

  // Up to 32 rows, one a lane, -1 for none; false when there are no more.
  __device__ bool NextOfLanes(int64_t* row) {
    int lane = threadIdx.x % kWarpSize;
    *row = -1;
    if (is_done_) return false;
    if (padding_ < candidates_) {
      int64_t i = padding_ + lane * num_workers_;
      if (i < candidates_) {
        auto [r, group] = Divide(i, plan_.num_groups);
        int64_t unused = plan_.group_counts[group] + r;
        if (unused < plan_.group_sizes[group]) *row = plan_.group_starts[group] + unused;
      }
      padding_ += kWarpSize * num_workers_;
      return true;
    }
    int last = plan_.num_groups - 1;
    int64_t base = plan_.group_starts[last] + plan_.group_sizes[last] + tail_;
    is_done_ = !plan_.zero_tail || base >= plan_.capacity;
    if (is_done_) return false;
    if (base + lane * num_workers_ < plan_.capacity) *row = base + lane * num_workers_;
    tail_ += kWarpSize * num_workers_;
    return true;
  }

 private:
  const RowsPlan& plan_;
  int64_t candidates_;
  int64_t padding_, tail_;  // the next to look at, of lane 0
  int64_t num_workers_;
  bool is_done_ = false;
  int64_t found_ = -1;  // by this lane
  unsigned lanes_ = 0;  // whose rows are still to be returned by Next
};

// Zeroes a row with bulk stores of one lane, in its next group, from so many zero bytes of shared
// memory.
__device__ inline void BulkZeroRow(char* row, int64_t row_bytes, const void* zeros, int num_zeros) {
  if (threadIdx.x % kWarpSize != 0) return;
#pragma unroll 1
  for (int64_t offset = 0; offset < row_bytes; offset += num_zeros) {
    int64_t left = row_bytes - offset;
    ptx::BulkStore(row + offset, zeros, static_cast<uint32_t>(min(left, int64_t{num_zeros})));
  }
}

// Zeroes them, 16 bytes a lane.
__device__ inline void ZeroRowsByWarp(
    const RowsPlan& plan, char* rows, int64_t row_bytes, int64_t worker, int64_t num_workers) {
  ZeroRows zero(plan, worker, num_workers);
  for (int64_t row; zero.Next(&row);) {
    uint4* out = reinterpret_cast<uint4*>(rows + row * row_bytes);
#pragma unroll 4
    for (int64_t i = threadIdx.x % kWarpSize; i < row_bytes / kVecBytes; i += kWarpSize) {
      out[i] = make_uint4(0, 0, 0, 0);
    }
  }
}

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_ROWS_CUH_
