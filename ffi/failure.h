// A failure of a group in words.

#ifndef JAX_MOE_EP_FAILURE_H_
#define JAX_MOE_EP_FAILURE_H_

#include <string>

#include "layout.h"

namespace jax_moe_ep {

// What happened on `device`, and what to do.
std::string Describe(const Failure& failure, int num_ranks, int device);

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_FAILURE_H_
