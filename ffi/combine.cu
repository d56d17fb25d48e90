#include <algorithm>

#include "combine.h"
#include "combine_rows.cuh"
#include "rows.cuh"

namespace jax_moe_ep {
namespace {

constexpr int kCombineThreads = 128;
constexpr int kCombineBlocksPerSm = 6;  // resident at once: 80 registers a thread

constexpr int kBackwardThreads = 256;
constexpr int kBackwardWarps = kBackwardThreads / kWarpSize;
constexpr int kBackwardBlocksPerSm = 8;

template <typename T>
struct CombineParams {
  RowsPlan plan;
  const T* y;            // [C, H]
  const float* weights;  // [T, K] or null
  T* out;                // [T, H]
  int64_t hidden;        // H
};

template <typename T>
struct CombineBackwardParams {
  RowsPlan plan;
  const T* dout;         // [T, H]
  const T* y;            // [C, H]
  const float* weights;  // [T, K]
  T* dy;                 // [C, H]
  float* dweights;       // [T, K]
  int64_t hidden;        // H
};

// Inputs: plan, y, weights; writes all of out. Launch: any number of blocks of kCombineThreads. A
// thread sums one 16-byte vector of one token at a time.
//
// Example (K = 2, H = 1 of 4 copies): slots (0 2), weights (2, 0.5), y = 1, -, 4 gives
// 2*1 + 0.5*4 = 4.
template <typename T>
__global__ void __launch_bounds__(kCombineThreads, kCombineBlocksPerSm)
    CombineKernel(const __grid_constant__ CombineParams<T> p) {
  int64_t vectors = p.hidden / Vec<T>::kSize;
  int64_t tiles = CeilDiv(vectors, kCombineThreads);
  for (int64_t item = blockIdx.x; item < p.plan.num_tokens * tiles; item += gridDim.x) {
    int64_t token = item / tiles;
    int64_t index = item % tiles * kCombineThreads + threadIdx.x;
    if (index >= vectors) continue;
    float sums[Vec<T>::kSize] = {};
    const float* weights = p.weights ? p.weights + token * p.plan.top_k : nullptr;
    SumRows(p.y, p.hidden, p.plan.slots + token * p.plan.top_k, weights, p.plan.top_k, index, sums);
    // The token's side adds the rounded partial to +0: it turns -0 into +0.
#pragma unroll
    for (float& sum : sums) sum = 0.0f + Rounded<T>(sum);
    Vec<T>::Round(sums).Store(p.out + token * p.hidden, index);
  }
}

// Inputs: plan, dout, y, weights; writes all of dweights, and dy but for an undefined tail.
// Launch: any number of blocks of kBackwardThreads; a block takes one token at a time.
//
// Example (K = 2, H = 2): dout = (1, 2), slots (1 -1), weights (3, NaN), y[1] = (4, 5) gives
// dy[1] = (3, 6), dweights = (14, 0).
template <typename T>
__global__ void __launch_bounds__(kBackwardThreads)
    CombineBackwardKernel(const __grid_constant__ CombineBackwardParams<T> p) {
  const Team<kBackwardThreads> block;
  __shared__ float partial[kBackwardWarps][kWeightsAtOnce];
  for (int64_t token = blockIdx.x; token < p.plan.num_tokens; token += gridDim.x) {
    int64_t place = token * p.plan.top_k;
    const T* dout = p.dout + token * p.hidden;
    TokenGradients<T> gradients{
        dout, p.y, p.dy, p.hidden, p.hidden, p.plan.slots + place, p.weights + place};
    for (int first = 0; first < p.plan.top_k; first += kWeightsAtOnce) {
      int count = min(kWeightsAtOnce, p.plan.top_k - first);
      gradients.ScaleAndDot(block, first, count, partial);
      float dot = SumOverWarps(block, partial);
      if (threadIdx.x < count) p.dweights[place + first + threadIdx.x] = dot;
      block.Sync();
    }
  }
  int64_t worker = (int64_t{blockIdx.x} * kBackwardThreads + threadIdx.x) / kWarpSize;
  ZeroRowsByWarp(p.plan,
                 reinterpret_cast<char*>(p.dy),
                 p.hidden * sizeof(T),
                 worker,
                 int64_t{gridDim.x} * kBackwardWarps);
}

template <typename T>
cudaError_t LoadKernels() {
  cudaFuncAttributes attributes;
  if (cudaError_t status = cudaFuncGetAttributes(&attributes, CombineKernel<T>);
      status != cudaSuccess) {
    return status;
  }
  return cudaFuncGetAttributes(&attributes, CombineBackwardKernel<T>);
}

}  // namespace

cudaError_t LoadCombine() {
  return ForEachFloatType([](auto zero) { return LoadKernels<decltype(zero)>(); });
}

cudaError_t LaunchCombine(const RowsPlan& plan,
                          const LaunchLimits& limits,
                          FloatType type,
                          const void* y,
                          const float* weights,
                          void* out,
                          int64_t row_bytes,
                          cudaStream_t stream) {
  return WithType(type, [&](auto zero) {
    using T = decltype(zero);
    CombineParams<T> params{plan,
                            static_cast<const T*>(y),
                            weights,
                            static_cast<T*>(out),
                            row_bytes / static_cast<int64_t>(sizeof(T))};
    // A block an item, for the hardware to balance; with a bound, what these SMs hold at once.
    int64_t vectors = params.hidden / Vec<T>::kSize;
    int64_t items = plan.num_tokens * CeilDiv(vectors, kCombineThreads);
    int64_t most = limits.is_bounded ? limits.num_sms * kCombineBlocksPerSm : INT32_MAX;
    CombineKernel<T>
        <<<static_cast<int>(std::min(items, most)), kCombineThreads, 0, stream>>>(params);
    return cudaGetLastError();
  });
}

cudaError_t LaunchCombineBackward(const RowsPlan& plan,
                                  const LaunchLimits& limits,
                                  FloatType type,
                                  const void* dout,
                                  const void* y,
                                  const float* weights,
                                  void* dy,
                                  float* dweights,
                                  int64_t row_bytes,
                                  cudaStream_t stream) {
  return WithType(type, [&](auto zero) {
    using T = decltype(zero);
    CombineBackwardParams<T> params{plan,
                                    static_cast<const T*>(dout),
                                    static_cast<const T*>(y),
                                    weights,
                                    static_cast<T*>(dy),
                                    dweights,
                                    row_bytes / static_cast<int64_t>(sizeof(T))};
    CombineBackwardKernel<T>
        <<<limits.num_sms * kBackwardBlocksPerSm, kBackwardThreads, 0, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace jax_moe_ep
