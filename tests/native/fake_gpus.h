#ifndef JAX_MOE_EP_TESTS_FAKE_GPUS_H_
#define JAX_MOE_EP_TESTS_FAKE_GPUS_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <vector>

namespace jax_moe_ep {
struct NcclComm;
}

namespace fake {

struct Gathering;

// The communicators of a new group, by rank.
std::vector<jax_moe_ep::NcclComm*> NewGroup(int num_ranks);

// Of this thread.
void SetDevice(int index);

// Device allocations that nobody has freed.
size_t NumAllocations();

extern bool can_access_peers;
extern bool is_blind;  // proofs read something else

}  // namespace fake

#endif  // JAX_MOE_EP_TESTS_FAKE_GPUS_H_
