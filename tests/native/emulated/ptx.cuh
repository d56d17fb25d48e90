// Replaces ffi/ptx.cuh where kernels run on the host.

#ifndef JAX_MOE_EP_PTX_CUH_
#define JAX_MOE_EP_PTX_CUH_

#include <cstdint>

#include "device.h"
#include "memory.cuh"

namespace jax_moe_ep::ptx {

inline void FenceProxyAsync() {}

inline bool NamedBarrierAnd(int id, int threads, bool value) {
  return emulated::block->named[id].Wait(threads, value);
}
inline void NamedBarrier(int id, int threads) { NamedBarrierAnd(id, threads, true); }

// Bulk copies are done at once. A barrier holds how many of its phases are complete.
inline void MbarrierInit(uint64_t* barrier, uint32_t) { Store(barrier, uint64_t{0}); }
inline void FenceProxyAsyncShared() {}
inline void MbarrierArriveExpectBytes(uint64_t* barrier, uint32_t bytes) {
  if (bytes == 0) __atomic_fetch_add(barrier, 1, __ATOMIC_SEQ_CST);
}
inline void MbarrierWait(uint64_t* barrier, uint32_t parity) {
  while ((Load(barrier) & 1) == parity) sched_yield();
}
inline void BulkLoad(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  memcpy(shared, global, bytes);
  __atomic_fetch_add(barrier, 1, __ATOMIC_SEQ_CST);
}
inline void BulkStore(void* global, const void* shared, uint32_t bytes) {
  memcpy(global, shared, bytes);
}
inline void BulkCommitGroup() {}
template <int kPending>
void BulkWaitGroupRead() {}
inline void BulkWaitAll() {}

}  // namespace jax_moe_ep::ptx

#endif  // JAX_MOE_EP_PTX_CUH_
