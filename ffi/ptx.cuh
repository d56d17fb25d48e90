// The PTX instructions that the kernels use, one function each. Bulk copies are for sm_90 and
// later.

#ifndef JAX_MOE_EP_PTX_CUH_
#define JAX_MOE_EP_PTX_CUH_

#include <cstdint>

namespace jax_moe_ep::ptx {

__device__ inline uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline void MbarrierInit(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes initialised barriers, and ordinary stores to shared memory, visible to bulk copies.
__device__ inline void FenceProxyAsyncShared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Orders ordinary accesses of global memory before bulk copies and the other way round. Nothing to
// order where there are no bulk copies.
__device__ inline void FenceProxyAsync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}

// A barrier of `threads` threads of the block; different ids do not meet. Id 0 is __syncthreads.
__device__ inline void NamedBarrier(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same; true when `value` is true in all of them.
__device__ inline bool NamedBarrierAnd(int id, int threads, bool value) {
  int all;
  asm volatile(
      "{\n"
      ".reg .pred in, out;\n"
      "setp.ne.s32 in, %1, 0;\n"
      "barrier.red.and.pred out, %2, %3, in;\n"
      "selp.s32 %0, 1, 0, out;\n"
      "}\n"
      : "=r"(all)
      : "r"(static_cast<int>(value)), "r"(id), "r"(threads)
      : "memory");
  return all != 0;
}

__device__ inline void MbarrierArriveExpectBytes(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
}

__device__ inline void MbarrierArrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(barrier)) : "memory");
}

__device__ inline void MbarrierWait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(SharedAddress(barrier)),
      "r"(parity)
      : "memory");
}

// Global to shared memory; completes on the barrier. Addresses and size are multiples of 16.
__device__ inline void BulkLoad(void* shared,
                                const void* global,
                                uint32_t bytes,
                                uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(SharedAddress(shared)),
      "l"(global),
      "r"(bytes),
      "r"(SharedAddress(barrier))
      : "memory");
}

// Shared to global memory; belongs to the thread's next group.
__device__ inline void BulkStore(void* global, const void* shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(SharedAddress(shared)),
               "r"(bytes)
               : "memory");
}

__device__ inline void BulkCommitGroup() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until at most kPending of the thread's latest groups have not yet read their shared memory.
template <int kPending>
__device__ inline void BulkWaitGroupRead() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Until the writes of all of the thread's groups are done.
__device__ inline void BulkWaitAll() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

}  // namespace jax_moe_ep::ptx

#endif  // JAX_MOE_EP_PTX_CUH_
