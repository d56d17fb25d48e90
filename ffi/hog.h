// For tests: a kernel that keeps SMs busy beside the stream of XLA.

#ifndef JAX_MOE_EP_HOG_H_
#define JAX_MOE_EP_HOG_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_moe_ep {

// Fills num_sms SMs of the current device for `ns`, on a stream of its own; returns at once.
cudaError_t LaunchHog(int num_sms, uint64_t ns);

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_HOG_H_
