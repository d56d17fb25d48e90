// Loads and stores that order memory between threads of different GPUs or blocks, and waits that
// end.
//
// Peer and arena memory is never read through __ldg, ld.nc or const __restrict__: these may return
// what a cache held before the peer wrote.

#ifndef JAX_MOE_EP_SIGNAL_CUH_
#define JAX_MOE_EP_SIGNAL_CUH_

#include "layout.h"

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

// Relaxed, system scope: no order; for words that are looked at in passing.
__device__ inline uint32_t LoadRelaxedSystem(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
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

// Acquire, device scope, when it succeeds: what the last holder of the lock wrote is visible.
__device__ inline bool TryLockDevice(uint32_t* lock) {
  uint32_t before;
  asm volatile("atom.acquire.gpu.global.cas.b32 %0, [%1], 0, 1;"
               : "=r"(before)
               : "l"(lock)
               : "memory");
  return before == 0;
}

__device__ inline void UnlockDevice(uint32_t* lock) {
  asm volatile("st.release.gpu.global.u32 [%0], 0;" ::"l"(lock) : "memory");
}

__device__ inline uint64_t TimeNs() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

__device__ inline bool HasAborted(const GroupView& group) {
  return LoadRelaxedSystem(&group.controls[group.rank]->abort) != 0;
}

// Ends the work of all ranks: the first failure of this rank is written to the host, then every
// rank is told. Later calls see the abort word first and do nothing.
__device__ inline void Fail(const GroupView& group, const Failure& failure) {
  Control* own = group.controls[group.rank];
  if (atomicExch(&own->has_failed, 1u) == 0) {
    Failure* host = group.failure;
    host->phase = failure.phase;
    host->rank = group.rank;
    host->peer = failure.peer;
    host->expected = failure.expected;
    host->seen = failure.seen;
    host->waited_ns = group.timeout_ns;
    host->mine = group.signature;
    host->theirs = failure.theirs;
    __threadfence_system();
    *reinterpret_cast<volatile FailureKind*>(&host->kind) = failure.kind;
  }
  if (failure.kind == FailureKind::kPeer) return;
  for (int rank = 0; rank < group.num_ranks; ++rank) {
    StoreReleaseSystem(&group.controls[rank]->abort, 1u + group.rank);
  }
}

// Calls is_done() until it is true. False when this rank or a peer gave up; `failure` describes the
// wait, and seen() what it found instead.
template <typename IsDone, typename Seen>
__device__ bool WaitUntil(const GroupView& group, IsDone is_done, Seen seen, Failure failure) {
  uint64_t start = TimeNs();
  while (!is_done()) {
    if (uint32_t abort = LoadRelaxedSystem(&group.controls[group.rank]->abort); abort != 0) {
      failure.kind = FailureKind::kPeer;
      failure.peer = static_cast<int32_t>(abort) - 1;
      Fail(group, failure);
      return false;
    }
    if (TimeNs() - start > group.timeout_ns) {
      failure.kind = FailureKind::kTimeout;
      failure.seen = seen();
      Fail(group, failure);
      return false;
    }
    __nanosleep(32);
  }
  return true;
}

// Until a flag that `peer` raises in this rank's memory reaches the epoch. It may be past it: a
// fast peer is up to two calls ahead.
__device__ inline bool WaitForFlag(
    const GroupView& group, const uint64_t* flag, uint64_t epoch, Phase phase, int peer) {
  Failure failure{};
  failure.phase = phase;
  failure.peer = peer;
  failure.expected = epoch;
  return WaitUntil(
      group,
      [&] { return LoadAcquireSystem(flag) >= epoch; },
      [&] { return LoadAcquireSystem(flag); },
      failure);
}

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_SIGNAL_CUH_
