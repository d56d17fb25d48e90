// Replaces ffi/ptx.cuh where kernels run on the host. There are no bulk copies.

#ifndef JAX_MOE_EP_PTX_CUH_
#define JAX_MOE_EP_PTX_CUH_

#include <cstdint>

#include "device.h"

namespace jax_moe_ep::ptx {

inline void FenceProxyAsync() {}

inline bool NamedBarrierAnd(int id, int threads, bool value) {
  return emulated::block->named[id].Wait(threads, value);
}
inline void NamedBarrier(int id, int threads) { NamedBarrierAnd(id, threads, true); }

// Of the path that is not compiled here.
inline void MbarrierInit(uint64_t*, uint32_t) {}
inline void FenceProxyAsyncShared() {}
inline void MbarrierArriveExpectBytes(uint64_t*, uint32_t) {}
inline void MbarrierWait(uint64_t*, uint32_t) {}
inline void BulkLoad(void*, const void*, uint32_t, uint64_t*) {}
inline void BulkStore(void*, const void*, uint32_t) {}
inline void BulkCommitGroup() {}
template <int kPending>
void BulkWaitGroupRead() {}
inline void BulkWaitAll() {}

}  // namespace jax_moe_ep::ptx

#endif  // JAX_MOE_EP_PTX_CUH_
