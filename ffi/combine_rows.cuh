// What the kernels of combine do with the rows of one token.

#ifndef JAX_MOE_EP_COMBINE_ROWS_CUH_
#define JAX_MOE_EP_COMBINE_ROWS_CUH_

#include "combine.h"
#include "ptx.cuh"
#include "rows.cuh"
#include "vec.cuh"

namespace jax_moe_ep {
namespace {

constexpr int kRowsInFlight = 8;   // 16-byte loads of a thread before it adds
constexpr int kWeightsAtOnce = 8;  // dot products of a thread

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

// Calls use(T{}) for every type; stops at an error.
template <typename Use>
cudaError_t ForEachFloatType(Use use) {
  for (FloatType type : {FloatType::kF32, FloatType::kF16, FloatType::kBF16}) {
    if (cudaError_t status = WithType(type, use); status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

// Threads of a block that work on one token: neighbours, whole warps. A block has kTeams of them.
template <int kThreads_, int kTeams = 1>
struct Team {
  static constexpr int kThreads = kThreads_;
  static constexpr int kWarps = kThreads / kWarpSize;
  int id = kTeams == 1 ? 0 : threadIdx.x / kThreads;
  int thread = kTeams == 1 ? threadIdx.x : threadIdx.x % kThreads;

  __device__ void Sync() const {
    if constexpr (kTeams == 1) {
      __syncthreads();
    } else {
      ptx::NamedBarrier(1 + id, kThreads);
    }
  }

  // Sync; true when `value` is true in all threads.
  __device__ bool And(bool value) const { return ptx::NamedBarrierAnd(1 + id, kThreads, value); }
};

// The sum over k of one vector of a token. The rows of kRowsInFlight k are loaded at once and added
// in order; the intrinsics keep product and sum from becoming one fused multiply-add. No weights:
// a plain sum.
template <typename T>
__device__ void SumRows(const T* y,
                        int64_t hidden,
                        const int32_t* slots,
                        const float* weights,
                        int top_k,
                        int64_t index,
                        float (&sums)[Vec<T>::kSize]) {
  for (int first = 0; first < top_k; first += kRowsInFlight) {
    int32_t rows[kRowsInFlight];
    Vec<T> values[kRowsInFlight];
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      rows[i] = first + i < top_k ? slots[first + i] : -1;
      if (rows[i] >= 0) values[i] = Vec<T>::Load(y + rows[i] * hidden, index);
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

// Columns of one token of combine's backward: its gradient meets its rows. Pointers are to the
// first column.
template <typename T>
struct TokenGradients {
  const T* dout;   // [H]
  const T* y;      // [C, H]
  T* dy;           // [C, H]
  int64_t hidden;  // H
  int64_t num_columns;
  const int32_t* slots;  // [K]
  const float* weights;  // [K], not read at slots of -1

  // Writes dy of the rows of `count` weights from `first`, and each warp's share of their dot
  // products with y to partial[warp].
  template <typename Team>
  __device__ void ScaleAndDot(const Team& team,
                              int first,
                              int count,
                              float (*partial)[kWeightsAtOnce]) const {
    int32_t rows[kWeightsAtOnce];
    float scales[kWeightsAtOnce], dots[kWeightsAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kWeightsAtOnce; ++i) {
      rows[i] = i < count ? slots[first + i] : -1;
      scales[i] = rows[i] >= 0 ? weights[first + i] : 0.0f;
    }
    for (int64_t index = team.thread; index < num_columns / Vec<T>::kSize;
         index += Team::kThreads) {
      Vec<T> gradient = Vec<T>::Load(dout, index);
      Vec<T> values[kWeightsAtOnce];
#pragma unroll
      for (int i = 0; i < kWeightsAtOnce; ++i) {
        if (rows[i] >= 0) values[i] = Vec<T>::Load(y + rows[i] * hidden, index);
      }
#pragma unroll
      for (int i = 0; i < kWeightsAtOnce; ++i) {
        if (rows[i] < 0) continue;
        float scaled[Vec<T>::kSize];
#pragma unroll
        for (int j = 0; j < Vec<T>::kSize; ++j) {
          float g = gradient.Get(j);
          dots[i] += g * values[i].Get(j);
          scaled[j] = __fmul_rn(scales[i], g);
        }
        Vec<T>::Round(scaled).Store(dy + rows[i] * hidden, index);
      }
    }
#pragma unroll
    for (int i = 0; i < kWeightsAtOnce; ++i) {
      float sum = dots[i];
      for (int step = kWarpSize / 2; step > 0; step /= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, step);
      }
      if (team.thread % kWarpSize == 0) partial[team.thread / kWarpSize][i] = sum;
    }
  }
};

// The dot product of weight `thread`, for threads below kWeightsAtOnce: the warps' shares in order.
template <typename Team>
__device__ float SumOverWarps(const Team& team, const float (*partial)[kWeightsAtOnce]) {
  team.Sync();
  float sum = 0;
  for (int warp = 0; team.thread < kWeightsAtOnce && warp < Team::kWarps; ++warp) {
    sum += partial[warp][team.thread];
  }
  return sum;
}

}  // namespace
}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_COMBINE_ROWS_CUH_
