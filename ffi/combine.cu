#include <algorithm>

#include "combine.h"
#include "rows.cuh"
#include "vec.cuh"

namespace jax_moe_ep {
namespace {

constexpr int kCombineThreads = 128;
constexpr int kCombineBlocksPerSm = 6;  // resident at once: 80 registers a thread
constexpr int kRowsInFlight = 8;        // 16-byte loads of a thread before it adds

constexpr int kBackwardThreads = 256;
constexpr int kBackwardWarps = kBackwardThreads / kWarpSize;
constexpr int kBackwardBlocksPerSm = 8;
constexpr int kWeightsAtOnce = 8;  // dot products of a thread

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

// The sum over k of one vector of a token. The rows of kRowsInFlight k are loaded at once and added
// in order; the intrinsics keep product and sum from becoming one fused multiply-add.
template <typename T>
__device__ void SumRows(const CombineParams<T>& p,
                        int64_t token,
                        int64_t index,
                        float (&sums)[Vec<T>::kSize]) {
  const int32_t* slots = p.plan.slots + token * p.plan.top_k;
  const float* weights = p.weights ? p.weights + token * p.plan.top_k : nullptr;
  for (int first = 0; first < p.plan.top_k; first += kRowsInFlight) {
    int32_t rows[kRowsInFlight];
    Vec<T> values[kRowsInFlight];
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      rows[i] = first + i < p.plan.top_k ? slots[first + i] : -1;
      if (rows[i] >= 0) values[i] = Vec<T>::Load(p.y + rows[i] * p.hidden, index);
    }
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      if (rows[i] < 0) continue;
      float weight = weights ? weights[first + i] : 1.0f;
#pragma unroll
      for (int j = 0; j < Vec<T>::kSize; ++j) {
        sums[j] = __fadd_rn(sums[j], __fmul_rn(weight, values[i].Get(j)));
      }
    }
  }
}

// Inputs: plan, y, weights; writes all of out. Launch: any number of blocks of kCombineThreads. A
// thread sums one 16-byte vector of one token at a time.
//
// Example (K = 2, H = 1 of 4 copies): slots (0 2), weights (2, 0.5), y = 1, -, 4 gives
// 2*1 + 0.5*4 = 4.
template <typename T>
__global__ void __launch_bounds__(kCombineThreads, kCombineBlocksPerSm)
    CombineKernel(const __grid_constant__ CombineParams<T> p) {
  int64_t vectors = p.hidden / Vec<T>::kSize;
  int64_t tiles = (vectors + kCombineThreads - 1) / kCombineThreads;
  for (int64_t item = blockIdx.x; item < p.plan.num_tokens * tiles; item += gridDim.x) {
    int64_t token = item / tiles;
    int64_t index = item % tiles * kCombineThreads + threadIdx.x;
    if (index >= vectors) continue;
    float sums[Vec<T>::kSize] = {};
    SumRows(p, token, index, sums);
    // The token's side adds the rounded partial to +0: it turns -0 into +0.
#pragma unroll
    for (float& sum : sums) sum = 0.0f + Rounded<T>(sum);
    Vec<T>::Round(sums).Store(p.out + token * p.hidden, index);
  }
}

// dy of kWeightsAtOnce rows of a token, and the thread's share of their dot products.
template <typename T>
__device__ void ScaleAndDot(const CombineBackwardParams<T>& p,
                            int64_t token,
                            const int32_t (&rows)[kWeightsAtOnce],
                            const float (&weights)[kWeightsAtOnce],
                            float (&dots)[kWeightsAtOnce]) {
  for (int64_t index = threadIdx.x; index < p.hidden / Vec<T>::kSize; index += kBackwardThreads) {
    Vec<T> gradient = Vec<T>::Load(p.dout + token * p.hidden, index);
    Vec<T> values[kWeightsAtOnce];
#pragma unroll
    for (int i = 0; i < kWeightsAtOnce; ++i) {
      if (rows[i] >= 0) values[i] = Vec<T>::Load(p.y + rows[i] * p.hidden, index);
    }
#pragma unroll
    for (int i = 0; i < kWeightsAtOnce; ++i) {
      if (rows[i] < 0) continue;
      float scaled[Vec<T>::kSize];
#pragma unroll
      for (int j = 0; j < Vec<T>::kSize; ++j) {
        float g = gradient.Get(j);
        dots[i] += g * values[i].Get(j);
        scaled[j] = __fmul_rn(weights[i], g);
      }
      Vec<T>::Round(scaled).Store(p.dy + rows[i] * p.hidden, index);
    }
  }
}

// dweights[i] = the sum of dots[i] over the block: lanes by a butterfly, then warps in order.
__device__ void WriteDots(const float (&dots)[kWeightsAtOnce], float* dweights, int count) {
  __shared__ float partial[kBackwardWarps][kWeightsAtOnce];
#pragma unroll
  for (int i = 0; i < kWeightsAtOnce; ++i) {
    float sum = dots[i];
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, step);
    }
    if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize][i] = sum;
  }
  __syncthreads();
  if (threadIdx.x < count) {
    float sum = 0;
    for (int warp = 0; warp < kBackwardWarps; ++warp) sum += partial[warp][threadIdx.x];
    dweights[threadIdx.x] = sum;
  }
  __syncthreads();
}

// Inputs: plan, dout, y, weights; writes all of dweights, and dy but for an undefined tail.
// Launch: any number of blocks of kBackwardThreads; a block takes one token at a time.
//
// Example (K = 2, H = 2): dout = (1, 2), slots (1 -1), weights (3, NaN), y[1] = (4, 5) gives
// dy[1] = (3, 6), dweights = (14, 0).
template <typename T>
__global__ void __launch_bounds__(kBackwardThreads)
    CombineBackwardKernel(const __grid_constant__ CombineBackwardParams<T> p) {
  for (int64_t token = blockIdx.x; token < p.plan.num_tokens; token += gridDim.x) {
    for (int first = 0; first < p.plan.top_k; first += kWeightsAtOnce) {
      int32_t rows[kWeightsAtOnce];
      float weights[kWeightsAtOnce], dots[kWeightsAtOnce] = {};
      int64_t place = token * p.plan.top_k + first;
      int count = min(kWeightsAtOnce, p.plan.top_k - first);
#pragma unroll
      for (int i = 0; i < kWeightsAtOnce; ++i) {
        rows[i] = i < count ? p.plan.slots[place + i] : -1;
        weights[i] = rows[i] >= 0 ? p.weights[place + i] : 0.0f;
      }
      ScaleAndDot(p, token, rows, weights, dots);
      WriteDots(dots, p.dweights + place, count);
    }
  }
  int64_t worker = (int64_t{blockIdx.x} * kBackwardThreads + threadIdx.x) / kWarpSize;
  ZeroRowsByWarp(p.plan,
                 reinterpret_cast<char*>(p.dy),
                 p.hidden * sizeof(T),
                 worker,
                 int64_t{gridDim.x} * kBackwardWarps);
}

// Calls use(T{}) with the C++ type.
template <typename Use>
auto WithType(FloatType type, Use use) {
  switch (type) {
    case FloatType::kF16:
      return use(__half{});
    case FloatType::kBF16:
      return use(__nv_bfloat16{});
    default:
      return use(float{});
  }
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
  for (FloatType type : {FloatType::kF32, FloatType::kF16, FloatType::kBF16}) {
    cudaError_t status = WithType(type, [](auto zero) { return LoadKernels<decltype(zero)>(); });
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
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
    int64_t items = plan.num_tokens * ((vectors + kCombineThreads - 1) / kCombineThreads);
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
