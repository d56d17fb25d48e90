// Which process this is, and on which host: numbers that differ between any two.

#ifndef JAX_MOE_EP_IDENTITY_H_
#define JAX_MOE_EP_IDENTITY_H_

#include <cstdint>

namespace jax_moe_ep {

uint64_t RandomBits();

uint64_t ProcessToken();

// Equal for processes of one running kernel, in containers too.
uint64_t HostToken();

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_IDENTITY_H_
