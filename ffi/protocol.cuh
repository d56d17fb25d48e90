// The steps of one call of a group, on one rank.
//
//   Begin      the first block waits its turn, takes the next epoch e, waits until every peer has
//              consumed e - 2, and tells the peers where this rank's data is, unless it must be
//              staged first
//   Stage      blocks copy chunks to where peers read them; who copies the last one tells the peers
//   items      blocks claim them from a counter; one that needs a peer's data waits for it
//   Finish     whoever does the last item tells the peers that this rank reads nothing of e any
//              more, and lets the next call begin
//   End        every block; the last one to leave poisons the results if a rank gave up, where the
//              kernel has not done so itself
//
// No block owns work that others wait for: whatever runs claims all of it, so a kernel moves on
// with a single block resident. docs/design.md numbers the happens-before edges; the numbers stand
// here.

#ifndef JAX_MOE_EP_PROTOCOL_CUH_
#define JAX_MOE_EP_PROTOCOL_CUH_

#include "order.h"
#include "ptx.cuh"
#include "rows.cuh"
#include "signal.cuh"
#include "warp_chunk.cuh"

namespace jax_moe_ep {

inline constexpr int64_t kNoItem = INT64_MAX;

__device__ inline Control* OwnControl(const GroupView& group) { return group.controls[group.rank]; }

__device__ inline int Peer(const GroupView& group, int offset) {
  return PeerOf(group.rank, group.num_ranks, offset);
}

__device__ inline char* Half(const GroupView& group, int rank, uint64_t epoch) {
  return group.regions[rank] + (epoch & 1) * group.half_bytes;
}

// Raises a flag in each peer's memory, `flag` of its Control: one fence for all of them.
template <typename Flag>
__device__ void TellPeers(const GroupView& group, uint64_t epoch, Flag flag) {
  FenceSystem();
#pragma unroll 1
  for (int offset = 1; offset < group.num_ranks; ++offset) {
    StoreRelaxedSystem(flag(group.controls[Peer(group, offset)]), epoch);
  }
}

// Edge 1. The caller has seen all that the peers will read.
static __device__ __noinline__ void Publish(const GroupView& group, uint64_t epoch) {
#pragma unroll 1
  for (int offset = 1; offset < group.num_ranks; ++offset) {
    int peer = Peer(group, offset);
    CallRecord* record = &group.controls[peer]->records[epoch & 1][group.rank];
    record->signature = group.signature;
    record->address = group.published[peer];
  }
  TellPeers(group, epoch, [&](Control* peer) { return &peer->ready[group.rank]; });
  StoreReleaseDevice(&OwnControl(group)->ready[group.rank], epoch);  // for Finish
}

// A rank gave up: this rank's host will know, also where no wait of this one met it.
static __device__ __noinline__ void NoteAbortOf(const GroupView& group, uint32_t abort) {
  Failure failure{};
  failure.kind = FailureKind::kPeer;
  failure.peer = static_cast<int32_t>(abort) - 1;
  Fail(group, failure);
}

__device__ inline bool NoteAbort(const GroupView& group) {
  uint32_t abort = LoadRelaxedSystem(&OwnControl(group)->abort);
  if (abort != 0) NoteAbortOf(group, abort);
  return abort != 0;
}

inline constexpr uint64_t kIsRunning = 1;  // in Control::turn

// False when another call runs. `turn`: what is before this one.
__device__ inline bool TryTakeTurn(const GroupView& group, uint64_t* turn) {
  *turn = OrAcquireDevice(&OwnControl(group)->turn, kIsRunning);
  return !(*turn & kIsRunning);
}

__device__ inline void GiveTurn(const GroupView& group, uint64_t turn) {
  StoreReleaseDevice(&OwnControl(group)->turn, turn);
}

static __device__ __noinline__ bool WaitForTurn(const GroupView& group, uint64_t* turn) {
  Failure failure{};
  failure.phase = Phase::kLock;
  failure.peer = group.rank;
  return WaitUntil(
      group, [&] { return TryTakeTurn(group, turn); }, [] { return uint64_t{0}; }, failure);
}

__device__ inline uint64_t BeginFirst(const GroupView& group) {
  Control* own = OwnControl(group);
  // All of these are under way at once: nearly always they find what they look for.
  Fault fault = own->fault;
  bool has_aborted = HasAborted(group);
  uint64_t turn;
  bool has_turn = TryTakeTurn(group, &turn);
  if (has_aborted || fault.skips || fault.delay_ns > 0) {
    if (has_turn) GiveTurn(group, turn);
    has_turn = false;
    if (fault.skips) return kAborted;
    for (uint64_t start = TimeNs(); TimeNs() - start < fault.delay_ns;) __nanosleep(1000);
    if (NoteAbort(group)) return kAborted;
  }
  if (!has_turn && !WaitForTurn(group, &turn)) return kAborted;
  uint64_t epoch = turn / 2 + 1;
  // Edge 5: what this call writes to the halves of its parity was last read two calls ago.
#pragma unroll 1
  for (int offset = 1; epoch > 2 && offset < group.num_ranks; ++offset) {
    int peer = Peer(group, offset);
    if (!WaitForFlag(group, &own->consumed[peer], epoch - 2, Phase::kConsumed, peer)) {
      return kAborted;
    }
  }
  return epoch;
}

// One thread of each block, which passes the epoch on. kAborted: there is nothing to do but End.
__device__ inline uint64_t Begin(const GroupView& group, bool must_stage) {
  LaunchState* launch = group.launch;
  uint64_t epoch;
  bool is_alone = gridDim.x == 1;
  if (is_alone || AddRelaxedDevice(&launch->arrivals, 1) == 0) {
    epoch = BeginFirst(group);
    if (is_alone) {
      launch->epoch = epoch;
    } else {
      StoreReleaseDevice(&launch->epoch, epoch);
    }
    if (epoch != kAborted && !must_stage) Publish(group, epoch);
    return epoch;
  }
  // The first block gives up in time.
  while ((epoch = LoadAcquireDevice(&launch->epoch)) == 0) __nanosleep(32);
  return epoch;
}

// The next number of a counter, or kNoItem once a rank gave up.
__device__ inline int64_t Claim(const GroupView& group, uint64_t* counter) {
  int64_t item = static_cast<int64_t>(AddRelaxedDevice(counter, 1));
  return HasAborted(group) ? kNoItem : item;  // both are under way at once
}

// All lanes of a warp get the same.
__device__ inline int64_t ClaimByWarp(const GroupView& group, uint64_t* counter) {
  int64_t item = 0;
  if (threadIdx.x % kWarpSize == 0) item = Claim(group, counter);
  return __shfl_sync(kAllLanes, item, 0);
}

// A warp's claims of items, in increasing order. The next one is asked for before the work on this
// one.
struct WarpClaims {
  const GroupView& group;
  // Of lane 0. Not looked at before Next, or asking would be waiting.
  uint64_t next = 0;
  uint32_t abort = 0;

  __device__ explicit WarpClaims(const GroupView& group) : group(group) { Ask(); }

  // All lanes get the same.
  __device__ int64_t Next() {
    uint64_t item = __shfl_sync(kAllLanes, next, 0);
    bool has_aborted = __shfl_sync(kAllLanes, abort, 0) != 0;
    Ask();
    return has_aborted ? kNoItem : static_cast<int64_t>(item);
  }

 private:
  __device__ void Ask() {
    if (threadIdx.x % kWarpSize != 0) return;
    next = AddRelaxedDevice(&group.launch->claims, 1);
    abort = LoadRelaxedSystem(&OwnControl(group)->abort);
  }
};

// A warp stages 16 KB at a time, or what is left.
inline constexpr int64_t kChunkBytes = 16 * 1024;

inline int64_t NumChunks(int64_t bytes, int64_t chunk_bytes = kChunkBytes) {
  return (bytes + chunk_bytes - 1) / chunk_bytes;
}

__device__ inline void CopyChunk(const uint4* from, uint4* to, int64_t chunk, int64_t num_vectors) {
  constexpr int64_t kParts = kChunkBytes / (kWarpChunk * kVecBytes);
  int64_t end = min((chunk + 1) * kParts, NumWarpChunks(num_vectors));
  for (int64_t part = chunk * kParts; part < end; ++part) {
    WarpChunk<uint4> vectors(part, num_vectors);
    vectors.Load(from);
    vectors.Store(to);
  }
}

// A warp has staged `count` chunks, and its lane 0 sees that all are written; who stages the last
// tells the peers.
__device__ inline void CompleteStaging(const GroupView& group,
                                       uint64_t epoch,
                                       int64_t count,
                                       int64_t num_chunks) {
  __syncwarp();
  if (threadIdx.x % kWarpSize != 0 || count == 0) return;
  // Edge 2, on the writer's side: staged or read by bulk copies, or by neither.
  ptx::FenceProxyAsync();
  int64_t before = static_cast<int64_t>(AddAcqRelDevice(&group.launch->staged, count));
  if (before + count == num_chunks) Publish(group, epoch);
}

// Every warp: copy(chunk) for chunks that are claimed until all are; then the peers are told.
template <typename Copy>
__device__ void Stage(const GroupView& group, uint64_t epoch, int64_t num_chunks, Copy copy) {
  LaunchState* launch = group.launch;
  int64_t count = 0;
  for (int64_t chunk; (chunk = ClaimByWarp(group, &launch->staging)) < num_chunks; ++count) {
    copy(chunk);
  }
  CompleteStaging(group, epoch, count, num_chunks);
}

__device__ inline bool AreEqual(const CallSignature& a, const CallSignature& b) {
  return a.op == b.op && a.top_k == b.top_k && a.num_tokens == b.num_tokens &&
         a.row_bytes == b.row_bytes && a.options == b.options;
}

static __device__ __noinline__ void FailByMismatch(const GroupView& group,
                                                   uint64_t epoch,
                                                   int peer) {
  Failure failure{};
  failure.kind = FailureKind::kMismatch;
  failure.phase = Phase::kReady;
  failure.peer = peer;
  failure.expected = epoch;
  failure.theirs = OwnControl(group)->records[epoch & 1][peer].signature;
  Fail(group, failure);
}

// Edge 2. One thread: until the peer's data of this call can be read by it, or through a barrier by
// others. False when a rank gave up, or the peer is in another call.
__device__ inline bool WaitForReady(const GroupView& group, uint64_t epoch, int peer) {
  if (peer == group.rank) return true;
  Control* own = OwnControl(group);
  if (!WaitForFlag(group, &own->ready[peer], epoch, Phase::kReady, peer)) return false;
  ptx::FenceProxyAsync();
  if (AreEqual(own->records[epoch & 1][peer].signature, group.signature)) return true;
  FailByMismatch(group, epoch, peer);
  return false;
}

// Which ranks a warp has seen ready.
struct WarpReady {
  uint32_t ranks = 0;  // a bit a rank

  // All lanes. False when a rank gave up.
  __device__ bool Wait(const GroupView& group, uint64_t epoch, int source) {
    if (ranks >> source & 1) return true;
    bool is_ready = threadIdx.x % kWarpSize != 0 || WaitForReady(group, epoch, source);
    if (!__shfl_sync(kAllLanes, is_ready, 0)) return false;
    __syncwarp();  // lane 0 has acquired for all
    ranks |= 1u << source;
    return true;
  }
};

// Where tokens of a rank can be read once it is ready: `x` for this one.
__device__ inline const char* TokensOf(
    const GroupView& group, uint64_t epoch, int source, const char* x, int64_t staging_offset) {
  if (source == group.rank) return x;
  const char* address = OwnControl(group)->records[epoch & 1][source].address;
  return address != nullptr ? address : Half(group, source, epoch) + staging_offset;
}

// Adds items that are done. True for the thread that completes all of them.
__device__ inline bool Complete(uint64_t* counter, int64_t count, int64_t total) {
  if (count == 0) return false;
  return static_cast<int64_t>(AddAcqRelDevice(counter, count)) + count == total;
}

// Edge 5. One thread, when all items are done.
__device__ inline void TellConsumed(const GroupView& group, uint64_t epoch) {
  TellPeers(group, epoch, [&](Control* peer) { return &peer->consumed[group.rank]; });
}

// The same thread, then. `must_wait`: peers read memory of XLA's, which is reused once this kernel
// ends.
__device__ inline void Finish(const GroupView& group, uint64_t epoch, bool must_wait) {
  Control* own = OwnControl(group);
  // Another warp may still publish, where no peer's data was needed: the next call must not
  // overtake it, or the peers' flags would fall.
  if (!WaitForFlag(group, &own->ready[group.rank], epoch, Phase::kFinish, group.rank)) return;
#pragma unroll 1
  for (int offset = 1; must_wait && offset < group.num_ranks; ++offset) {
    int peer = Peer(group, offset);
    if (!WaitForFlag(group, &own->consumed[peer], epoch, Phase::kFinish, peer)) return;
  }
  GiveTurn(group, 2 * epoch);
}

// All threads of every block, once its work is done and visible to it.
template <typename Poison>
__device__ void End(const GroupView& group, Poison poison) {
  LaunchState* launch = group.launch;
  __shared__ bool is_last, is_poisoned;
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = gridDim.x == 1 || AddAcqRelDevice(&launch->exits, 1) == gridDim.x - 1;
    uint64_t epoch = launch->epoch;  // under way beside the other load
    bool has_aborted = HasAborted(group);
    is_poisoned = is_last && (has_aborted || epoch == kAborted);
    if (is_last && has_aborted) NoteAbort(group);
    if (is_last) *launch = LaunchState{};  // for the next launch
  }
  __syncthreads();
  if (is_poisoned) poison();
}

// All bits set: NaN in every floating type of the ops, -1 in signed integers.
static __device__ __noinline__ void PoisonByBlock(void* begin, int64_t bytes) {
  char* out = static_cast<char*>(begin);
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < bytes / kVecBytes; i += blockDim.x) {
    reinterpret_cast<uint4*>(out)[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
  }
  int64_t tail = bytes / kVecBytes * kVecBytes + threadIdx.x;
  if (tail < bytes) out[tail] = static_cast<char>(0xff);
}

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_PROTOCOL_CUH_
