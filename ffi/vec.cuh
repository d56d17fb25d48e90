// 16-byte vectors of bf16, fp16 or fp32, and their values in fp32.

#ifndef JAX_MOE_EP_VEC_CUH_
#define JAX_MOE_EP_VEC_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace jax_moe_ep {

inline constexpr int kVecBytes = 16;

// How one value lies in a 32-bit word, and what rounding to the type does.
template <typename T>
struct Element;

template <>
struct Element<float> {
  static __device__ float Get(uint32_t word, int) { return __uint_as_float(word); }
  static __device__ uint32_t Bits(float value) { return __float_as_uint(value); }
};

template <>
struct Element<__half> {
  static __device__ float Get(uint32_t word, int half) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(word >> 16 * half)));
  }
  static __device__ uint32_t Bits(float value) { return __half_as_ushort(__float2half_rn(value)); }
};

template <>
struct Element<__nv_bfloat16> {
  static __device__ float Get(uint32_t word, int half) {
    return __uint_as_float(half ? word & 0xffff0000u : word << 16);
  }
  static __device__ uint32_t Bits(float value) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
};

// The value rounded to T and back.
template <typename T>
__device__ float Rounded(float value) {
  return Element<T>::Get(Element<T>::Bits(value), 0);
}

// 16 bytes of a row. It stays in registers when indices are known when compiled.
template <typename T>
struct Vec {
  static constexpr int kSize = kVecBytes / sizeof(T);
  static constexpr int kPerWord = 4 / sizeof(T);
  uint32_t words[4];

  __device__ float Get(int i) const { return Element<T>::Get(words[i / kPerWord], i % kPerWord); }

  static __device__ Vec Round(const float (&values)[kSize]) {
    Vec vec = {};
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      vec.words[i / kPerWord] |= Element<T>::Bits(values[i]) << 16 * (i % kPerWord);
    }
    return vec;
  }

  static __device__ Vec Load(const T* row, int64_t index) {
    uint4 bits = reinterpret_cast<const uint4*>(row)[index];
    return {{bits.x, bits.y, bits.z, bits.w}};
  }

  __device__ void Store(T* row, int64_t index) const {
    reinterpret_cast<uint4*>(row)[index] = make_uint4(words[0], words[1], words[2], words[3]);
  }
};

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_VEC_CUH_
