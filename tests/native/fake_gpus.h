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
void SetProcess(int index);

// Device allocations that nobody has freed.
size_t NumAllocations();

extern bool can_access_peers;
extern bool is_blind;  // proofs read something else
extern bool is_full;   // no device has memory
extern int nccl_result;

// The driver: memory as XLA's allocator takes it; another allocation at the same address; what this
// thread can do; and mappings of pools by other processes.
char* NewPool(size_t bytes);
void Reallocate(char* pool);
extern thread_local bool can_export;
extern thread_local bool can_map;
extern thread_local bool is_slow_to_export;
extern thread_local bool is_slow_to_import;
extern thread_local bool exports_nothing;  // descriptors that cannot be sent
int NumPools();
int NumMappings();

}  // namespace fake

#endif  // JAX_MOE_EP_TESTS_FAKE_GPUS_H_
