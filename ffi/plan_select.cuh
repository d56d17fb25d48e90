// plan by priority: the key at which each overflowing expert's rows end.

#ifndef JAX_MOE_EP_PLAN_SELECT_CUH_
#define JAX_MOE_EP_PLAN_SELECT_CUH_

#include <cub/block/block_scan.cuh>

#include "plan_params.cuh"

namespace jax_moe_ep {
namespace {

// Whether the radix select looks for this expert's border.
__device__ bool IsSelecting(const PlanParams& p, int expert) {
  return p.quotas[expert] != INT32_MAX && p.caps[expert] > 0;
}

// digits[expert][d] += assignments of the expert whose key continues its threshold's high bits
// with the digit d at `shift`. Launch: any.
__global__ void SelectCountKernel(const __grid_constant__ PlanParams p, int shift) {
  int64_t size = int64_t{p.shape.assignments_per_rank} * p.shape.num_ranks;
  int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += stride) {
    int id = p.arrays.ids[i];
    if (id < 0 || id >= p.shape.num_experts || !IsSelecting(p, id)) continue;
    uint32_t key = PriorityKey(p.arrays.priority[i]);
    // A shift by all 32 bits is undefined: 64 bits for the first digit.
    if (uint64_t{key} >> (shift + kDigitBits) == p.thresholds[id]) {
      atomicAdd(&p.digits[int64_t{id} * kDigits + ((key >> shift) & (kDigits - 1))], 1);
    }
  }
}

// Appends to each threshold the digit in which the quota ends, takes what is above it from the
// quota, and clears the histogram for the next digit. Launch: E blocks of kDigits threads.
__global__ void __launch_bounds__(kDigits) SelectPickKernel(const __grid_constant__ PlanParams p) {
  int expert = blockIdx.x;
  if (!IsSelecting(p, expert)) return;
  using Scan = cub::BlockScan<int32_t, kDigits>;
  __shared__ Scan::TempStorage storage;
  int digit = kDigits - 1 - threadIdx.x;  // highest first
  int32_t& slot = p.digits[int64_t{expert} * kDigits + digit];
  int32_t count = slot, above;
  slot = 0;
  int32_t quota = p.quotas[expert];
  uint32_t threshold = p.thresholds[expert];
  Scan(storage).ExclusiveSum(count, above);
  if (above < quota && quota <= above + count) {
    p.thresholds[expert] = threshold << kDigitBits | digit;
    p.quotas[expert] = quota - above;
  }
}

void LaunchSelect(const PlanParams& params, cudaStream_t stream) {
  int64_t size = int64_t{params.shape.assignments_per_rank} * params.shape.num_ranks;
  for (int shift = kKeyBits - kDigitBits; shift >= 0; shift -= kDigitBits) {
    int blocks = CeilDiv(size, kDigits);
    SelectCountKernel<<<Blocks(params, blocks < kMaxChunks ? blocks : kMaxChunks),
                        kDigits,
                        0,
                        stream>>>(params, shift);
    SelectPickKernel<<<params.shape.num_experts, kDigits, 0, stream>>>(params);
  }
}

}  // namespace
}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_PLAN_SELECT_CUH_
