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

// Of one arrival. A phase is complete when that has come and so have all bytes, in any order.
struct Mbarrier {
  int32_t bytes;  // expected but not there, below 0 when they are there first
  uint16_t has_arrived;
  uint16_t num_phases;
};
static_assert(sizeof(Mbarrier) == sizeof(uint64_t));

inline void UpdateMbarrier(uint64_t* barrier, int arrivals, int32_t bytes) {
  uint64_t before = Load(barrier), after;
  do {
    auto state = __builtin_bit_cast(Mbarrier, before);
    state.has_arrived += arrivals;
    state.bytes += bytes;
    if (state.has_arrived == 1 && state.bytes == 0) {
      state.has_arrived = 0;
      ++state.num_phases;
    }
    after = __builtin_bit_cast(uint64_t, state);
  } while (!__atomic_compare_exchange_n(
      barrier, &before, after, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
}

inline void MbarrierInit(uint64_t* barrier, uint32_t) { Store(barrier, uint64_t{0}); }
inline void FenceProxyAsyncShared() {}
inline void MbarrierArriveExpectBytes(uint64_t* barrier, uint32_t bytes) {
  UpdateMbarrier(barrier, 1, static_cast<int32_t>(bytes));
}
inline void MbarrierArrive(uint64_t* barrier) { UpdateMbarrier(barrier, 1, 0); }
inline void MbarrierWait(uint64_t* barrier, uint32_t parity) {
  while ((__builtin_bit_cast(Mbarrier, Load(barrier)).num_phases & 1) == parity) sched_yield();
}
// Done at once.
inline void BulkLoad(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  memcpy(shared, global, bytes);
  UpdateMbarrier(barrier, 0, -static_cast<int32_t>(bytes));
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
