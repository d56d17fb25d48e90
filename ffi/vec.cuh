// 16-byte vectors of bf16, fp16 or fp32, and their values in fp32.

#ifndef JAX_MOE_EP_VEC_CUH_
#define JAX_MOE_EP_VEC_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace jax_moe_ep {

inline constexpr int kVecBytes = 16;

// How values lie in a 32-bit word, one or two, and how as many are rounded to the type: two by one
// instruction.
template <typename T>
struct Element;

template <>
struct Element<float> {
  static __device__ float Get(uint32_t word, int) { return __uint_as_float(word); }
  static __device__ uint32_t Word(const float* values) { return __float_as_uint(*values); }
};

template <>
struct Element<__half> {
  static __device__ float Get(uint32_t word, int half) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(word >> 16 * half)));
  }
  static __device__ uint32_t Word(const float* values) {
    __half2 pair = __floats2half2_rn(values[0], values[1]);
    return __half_as_ushort(__low2half(pair)) | __half_as_ushort(__high2half(pair)) << 16;
  }
};

template <>
struct Element<__nv_bfloat16> {
  static __device__ float Get(uint32_t word, int half) {
    return __uint_as_float(half ? word & 0xffff0000u : word << 16);
  }
  static __device__ uint32_t Word(const float* values) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(values[0], values[1]);
    return __bfloat16_as_ushort(__low2bfloat16(pair)) | __bfloat16_as_ushort(__high2bfloat16(pair))
                                                            << 16;
  }
};

// The value rounded to T and back.
template <typename T>
__device__ float Rounded(float value) {
  const float values[] = {value, 0.0f};
  return Element<T>::Get(Element<T>::Word(values), 0);
}

// 16 bytes of a row. It stays in registers when indices are known when compiled.
template <typename T>
struct Vec {
  static constexpr int kSize = kVecBytes / sizeof(T);
  static constexpr int kPerWord = 4 / sizeof(T);
  uint32_t words[4];

  __device__ float Get(int i) const { return Element<T>::Get(words[i / kPerWord], i % kPerWord); }

  static __device__ Vec Round(const float (&values)[kSize]) {
    Vec vec;
#pragma unroll
    for (int i = 0; i < 4; ++i) vec.words[i] = Element<T>::Word(values + i * kPerWord);
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
