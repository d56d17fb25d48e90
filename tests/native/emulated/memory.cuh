// Replaces ffi/memory.cuh where kernels run on the host: every access is sequentially consistent.

#ifndef JAX_MOE_EP_MEMORY_CUH_
#define JAX_MOE_EP_MEMORY_CUH_

#include <chrono>
#include <cstdint>

namespace jax_moe_ep {

template <typename T>
T Load(const T* address) {
  return __atomic_load_n(address, __ATOMIC_SEQ_CST);
}
template <typename T>
void Store(T* address, T value) {
  __atomic_store_n(address, value, __ATOMIC_SEQ_CST);
}

inline uint64_t LoadAcquireSystem(const uint64_t* flag) { return Load(flag); }
inline uint64_t LoadAcquireDevice(const uint64_t* flag) { return Load(flag); }
inline uint32_t LoadRelaxedSystem(const uint32_t* flag) { return Load(flag); }
inline uint64_t LoadRelaxedSystem(const uint64_t* word) { return Load(word); }
inline void StoreReleaseSystem(uint64_t* flag, uint64_t value) { Store(flag, value); }
inline void StoreReleaseSystem(uint32_t* flag, uint32_t value) { Store(flag, value); }
inline void StoreReleaseDevice(uint64_t* flag, uint64_t value) { Store(flag, value); }

inline uint64_t AddAcqRelDevice(uint64_t* counter, uint64_t value) {
  return __atomic_fetch_add(counter, value, __ATOMIC_SEQ_CST);
}
inline uint32_t AddAcqRelDevice(uint32_t* counter, uint32_t value) {
  return __atomic_fetch_add(counter, value, __ATOMIC_SEQ_CST);
}
inline uint64_t AddRelaxedDevice(uint64_t* counter, uint64_t value) {
  return __atomic_fetch_add(counter, value, __ATOMIC_SEQ_CST);
}

inline uint32_t AddRelaxedDevice(uint32_t* counter, uint32_t value) {
  return __atomic_fetch_add(counter, value, __ATOMIC_SEQ_CST);
}
inline uint64_t OrAcquireDevice(uint64_t* word, uint64_t bits) {
  return __atomic_fetch_or(word, bits, __ATOMIC_SEQ_CST);
}
inline void FenceSystem() {}
inline void StoreRelaxedSystem(uint64_t* flag, uint64_t value) { Store(flag, value); }

inline uint64_t TimeNs() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_MEMORY_CUH_
