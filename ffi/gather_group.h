// gather: small arrays of every rank of a group, brought to every rank.

#ifndef JAX_MOE_EP_GATHER_GROUP_H_
#define JAX_MOE_EP_GATHER_GROUP_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "layout.h"

namespace jax_moe_ep {

inline constexpr int kMaxGathered = 2;  // arrays of a call: expert ids and priorities

// Device pointers. out[i] = x[i] of all ranks, in rank order.
struct GatherArrays {
  int count;
  int64_t bytes;                // of each x, the same for all
  const void* x[kMaxGathered];  // [bytes]
  void* out[kMaxGathered];      // [R, bytes]
};

cudaError_t LoadGroupGather();

// Any number of bytes; nothing is launched for none. layout: that of T rows with the bytes of all
// arrays.
cudaError_t LaunchGroupGather(const GroupView& group,
                              const RegionLayout& layout,
                              const GatherArrays& arrays,
                              int max_blocks,
                              cudaStream_t stream);

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_GATHER_GROUP_H_
