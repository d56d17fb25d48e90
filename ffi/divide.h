// Division for kernels.

#ifndef JAX_MOE_EP_DIVIDE_H_
#define JAX_MOE_EP_DIVIDE_H_

#include <cstdint>

#include "host_device.h"

namespace jax_moe_ep {

struct Division {
  int64_t quotient, remainder;
};

JAX_MOE_EP_HOST_DEVICE inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of numbers that are not negative. GPUs divide 64 bits by hundreds of instructions, and nearly
// always 32 are enough.
JAX_MOE_EP_HOST_DEVICE inline Division Divide(int64_t a, int64_t b) {
  if ((a | b) >> 32 != 0) return {a / b, a % b};
  uint32_t quotient = static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return {quotient, static_cast<uint32_t>(a) - quotient * static_cast<uint32_t>(b)};
}

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_DIVIDE_H_
