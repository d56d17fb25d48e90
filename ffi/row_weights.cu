#include "row_weights.h"
#include "rows.cuh"

namespace jax_moe_ep {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 8;

template <typename T>
struct RowWeightsParams {
  RowsPlan plan;
  const T* in;
  T* out;
};

// Inputs: plan, weights [T, K]; writes all of row_weights [C]. Launch: any number of blocks.
//
// Example (C = 4): slots (2 0) (-1 3), weights (a b) (c d) gives b 0 a d.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    RowWeightsKernel(const __grid_constant__ RowWeightsParams<T> p) {
  int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  int64_t num_threads = int64_t{gridDim.x} * kThreads;
  for (int64_t i = thread; i < p.plan.num_tokens * p.plan.top_k; i += num_threads) {
    if (int32_t row = p.plan.slots[i]; row >= 0) p.out[row] = p.in[i];
  }
  ZeroRows zero(p.plan, thread / kWarpSize, num_threads / kWarpSize);
  for (int64_t row; zero.NextOfLanes(&row);) {
    if (row >= 0) p.out[row] = T{};
  }
}

// Inputs: plan, drow [C]; writes all of dweights [T, K]. Launch: any number of blocks.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    RowWeightsBackwardKernel(const __grid_constant__ RowWeightsParams<T> p) {
  int64_t num_threads = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
       i < p.plan.num_tokens * p.plan.top_k;
       i += num_threads) {
    int32_t row = p.plan.slots[i];
    p.out[i] = row >= 0 ? p.in[row] : T{};
  }
}

template <typename T>
RowWeightsParams<T> Params(const RowsPlan& plan, const void* in, void* out) {
  return {plan, static_cast<const T*>(in), static_cast<T*>(out)};
}

}  // namespace

cudaError_t LoadRowWeights() {
  const void* kernels[] = {
      reinterpret_cast<const void*>(RowWeightsKernel<uint16_t>),
      reinterpret_cast<const void*>(RowWeightsKernel<uint32_t>),
      reinterpret_cast<const void*>(RowWeightsBackwardKernel<uint16_t>),
      reinterpret_cast<const void*>(RowWeightsBackwardKernel<uint32_t>),
  };
  for (const void* kernel : kernels) {
    cudaFuncAttributes attributes;
    if (cudaError_t status = cudaFuncGetAttributes(&attributes, kernel); status != cudaSuccess) {
      return status;
    }
  }
  return cudaSuccess;
}

cudaError_t LaunchRowWeights(const RowsPlan& plan,
                             const LaunchLimits& limits,
                             const void* weights,
                             void* row_weights,
                             int element_bytes,
                             cudaStream_t stream) {
  RowsPlan all = plan;
  all.zero_tail = true;
  int blocks = limits.num_sms * kBlocksPerSm;
  if (element_bytes == 2) {
    RowWeightsKernel<<<blocks, kThreads, 0, stream>>>(Params<uint16_t>(all, weights, row_weights));
  } else {
    RowWeightsKernel<<<blocks, kThreads, 0, stream>>>(Params<uint32_t>(all, weights, row_weights));
  }
  return cudaGetLastError();
}

cudaError_t LaunchRowWeightsBackward(const RowsPlan& plan,
                                     const LaunchLimits& limits,
                                     const void* drow,
                                     void* dweights,
                                     int element_bytes,
                                     cudaStream_t stream) {
  int blocks = limits.num_sms * kBlocksPerSm;
  if (element_bytes == 2) {
    RowWeightsBackwardKernel<<<blocks, kThreads, 0, stream>>>(
        Params<uint16_t>(plan, drow, dweights));
  } else {
    RowWeightsBackwardKernel<<<blocks, kThreads, 0, stream>>>(
        Params<uint32_t>(plan, drow, dweights));
  }
  return cudaGetLastError();
}

}  // namespace jax_moe_ep
