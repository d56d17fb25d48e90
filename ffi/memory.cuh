// Loads and stores that order memory between threads of different GPUs or blocks.
//
// Peer and arena memory is never read through __ldg, ld.nc or const __restrict__: these may return
// what a cache held before the peer wrote.

#ifndef JAX_MOE_EP_MEMORY_CUH_
#define JAX_MOE_EP_MEMORY_CUH_

#include <cstdint>

namespace jax_moe_ep {

// Acquire, system scope: what the peer wrote before its release is visible after this.
__device__ inline uint64_t LoadAcquireSystem(const uint64_t* flag) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
}

// Release, system scope: all that this thread wrote, or saw through a barrier, is visible to a peer
// that acquires the value.
__device__ inline void StoreReleaseSystem(uint64_t* flag, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}

__device__ inline void StoreReleaseSystem(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

// Orders all that this thread wrote or saw before the relaxed stores that follow, as a release
// would: one for several of them.
__device__ inline void FenceSystem() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

__device__ inline void StoreRelaxedSystem(uint64_t* flag, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}

// Relaxed, system scope: no order; for words that are looked at in passing.
__device__ inline uint32_t LoadRelaxedSystem(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

__device__ inline uint64_t LoadRelaxedSystem(const uint64_t* word) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}

// Acquire and release, device scope: between blocks of one GPU.
__device__ inline uint64_t LoadAcquireDevice(const uint64_t* flag) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
}

__device__ inline void StoreReleaseDevice(uint64_t* flag, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}

// Acquire-release, device scope: the last of many to add sees what all of them wrote before.
__device__ inline uint64_t AddAcqRelDevice(uint64_t* counter, uint64_t value) {
  uint64_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(counter), "l"(value)
               : "memory");
  return before;
}

__device__ inline uint32_t AddAcqRelDevice(uint32_t* counter, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(value)
               : "memory");
  return before;
}

// Relaxed, device scope: hands out numbers, orders nothing.
__device__ inline uint64_t AddRelaxedDevice(uint64_t* counter, uint64_t value) {
  uint64_t before;
  asm volatile("atom.relaxed.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(counter), "l"(value)
               : "memory");
  return before;
}

__device__ inline uint32_t AddRelaxedDevice(uint32_t* counter, uint32_t value) {
  uint32_t before;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(value)
               : "memory");
  return before;
}

// Acquire, device scope: what was written before the release of the value is visible.
__device__ inline uint64_t OrAcquireDevice(uint64_t* word, uint64_t bits) {
  uint64_t before;
  asm volatile("atom.acquire.gpu.global.or.b64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(word), "l"(bits)
               : "memory");
  return before;
}

__device__ inline uint64_t TimeNs() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_MEMORY_CUH_
