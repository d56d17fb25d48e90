// What ranks signal to each other: where it lies, waits that end, and failures.

#ifndef JAX_MOE_EP_SIGNAL_CUH_
#define JAX_MOE_EP_SIGNAL_CUH_

#include "layout.h"
#include "memory.cuh"
#include "order.h"

namespace jax_moe_ep {

__device__ inline Control* OwnControl(const GroupView& group) { return group.controls[group.rank]; }

__device__ inline int Peer(const GroupView& group, int offset) {
  return PeerOf(group.rank, group.num_ranks, offset);
}

__device__ inline char* Half(const GroupView& group, int rank, uint64_t epoch) {
  return group.regions[rank] + (epoch & 1) * group.half_bytes;
}

__device__ inline bool HasAborted(const GroupView& group) {
  return LoadRelaxedSystem(&OwnControl(group)->abort) != 0;
}

// What only failures and long waits need stays out of line: the kernels' loops fit the instruction
// caches without it.

// Ends the work of all ranks: the first failure of this rank, and no later one, is written to the
// host, then every rank is told. Later calls see the abort word first and do nothing. Where another
// call of this rank is the first, this one's results are poisoned too, told or not yet.
static __device__ __noinline__ void Fail(const GroupView& group, const Failure& failure) {
  Control* own = OwnControl(group);
  if (atomicExch(&own->has_failed, 1u) != 0) {
    atomicCAS(&own->abort, 0u, 1u + group.rank);
    return;
  }
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
  if (failure.kind == FailureKind::kPeer) return;
#pragma unroll 1
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
    if (uint32_t abort = LoadRelaxedSystem(&OwnControl(group)->abort); abort != 0) {
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

static __device__ __noinline__ bool WaitLongForFlag(
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

// At what a peer writes, before a long wait for it: some 40 us.
inline constexpr int kLooks = 64;

// Until a flag that `peer` raises in this rank's memory reaches the epoch. It may be past it: a
// fast peer is up to two calls ahead.
__device__ inline bool WaitForFlag(
    const GroupView& group, const uint64_t* flag, uint64_t epoch, Phase phase, int peer) {
#pragma unroll 1
  for (int look = 0; look < kLooks; ++look) {
    if (LoadAcquireSystem(flag) >= epoch) return true;
  }
  return WaitLongForFlag(group, flag, epoch, phase, peer);
}

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_SIGNAL_CUH_
