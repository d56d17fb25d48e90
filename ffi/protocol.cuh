// The steps of one call of a group, on one rank.
//
//   Begin      the first block waits its turn and takes the next epoch e; every block waits until
//              every peer has consumed e - 2; the first one tells the peers where this rank's data
//              is, unless it must be staged first
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

#include "ready.cuh"
#include "warp_chunk.cuh"

namespace jax_moe_ep {

inline constexpr int64_t kNoItem = INT64_MAX;

// Raises a flag in each peer's memory, `flag` of its Control: one fence for all of them.
template <typename Flag>
__device__ void TellPeers(const GroupView& group, uint64_t epoch, Flag flag) {
  FenceSystem();
#pragma unroll 1
  for (int offset = 1; offset < group.num_ranks; ++offset) {
    StoreRelaxedSystem(flag(group.controls[Peer(group, offset)]), epoch);
  }
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
  return turn / 2 + 1;
}

// The calling block's part of a call that has begun, in shared memory.
struct BlockCall {
  uint64_t epoch;
  bool is_first;
};

// One thread of each block: who is first passes the epoch on.
__device__ inline BlockCall BeginByThread(const GroupView& group) {
  LaunchState* launch = group.launch;
  bool is_alone = gridDim.x == 1;
  if (is_alone || AddRelaxedDevice(&launch->arrivals, 1) == 0) {
    uint64_t epoch = BeginFirst(group);
    if (is_alone) {
      launch->epoch = epoch;
    } else {
      StoreReleaseDevice(&launch->epoch, epoch);
    }
    return {epoch, true};
  }
  // The first block gives up in time.
  uint64_t epoch;
  while ((epoch = LoadAcquireDevice(&launch->epoch)) == 0) __nanosleep(32);
  return {epoch, false};
}

// What a thread knows of it. kAborted: there is nothing to do but End.
struct Begun {
  uint64_t epoch;
  int num_told;  // 1 in the first lane of the warp that has told the peers
};

// All threads of a block of at least three warps; ends with a barrier. must_stage: the peers are
// told later.
__device__ inline Begun Begin(const GroupView& group, bool must_stage, BlockCall& call) {
  int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  // All at once: a warp takes the turn, one looks what peers have consumed, one has the fence of
  // edge 1 behind it.
  bool watches = warp == 1 && lane < group.num_ranks && lane != group.rank;
  const uint64_t* flag = &OwnControl(group)->consumed[watches ? lane : group.rank];
  uint64_t consumed = 0;
  if (threadIdx.x == 0) call = BeginByThread(group);
  if (watches) consumed = LoadAcquireSystem(flag);
  bool tells = warp == 2 && !must_stage;
  if (tells) FenceSystem();
  __syncthreads();
  uint64_t epoch = call.epoch;
  bool is_fine = epoch != kAborted;
  // Edge 5: what this call writes to the halves of its parity was last read two calls ago.
  if (watches && is_fine && consumed + 2 < epoch) {
    is_fine = WaitForFlag(group, flag, epoch - 2, Phase::kConsumed, lane);
  }
  if (!__syncthreads_and(is_fine)) return {kAborted, 0};
  if (!tells || !call.is_first) return {epoch, 0};
  SendPlaces(group, epoch);
  SendSignature(group, epoch);
  return {epoch, lane == 0};
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
  return CeilDiv(bytes, chunk_bytes);
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
// tells the peers, and returns 1 in lane 0.
__device__ inline int CompleteStaging(const GroupView& group,
                                      uint64_t epoch,
                                      int64_t count,
                                      int64_t num_chunks) {
  __syncwarp();
  bool is_first_lane = threadIdx.x % kWarpSize == 0, is_last = false;
  if (is_first_lane && count > 0) {
    // Edge 2, on the writer's side: staged or read by bulk copies, or by neither.
    ptx::FenceProxyAsync();
    int64_t before = static_cast<int64_t>(AddAcqRelDevice(&group.launch->staged, count));
    is_last = before + count == num_chunks;
  }
  if (!__shfl_sync(kAllLanes, is_last, 0)) return 0;
  __syncwarp();  // lane 0 has acquired for all
  Publish(group, epoch);
  return is_first_lane;
}

// Every warp: copy(chunk) for chunks that are claimed until all are; then the peers are told, and
// the lane that did gets 1. Without chunks Begin has told them.
template <typename Copy>
__device__ int Stage(const GroupView& group, uint64_t epoch, int64_t num_chunks, Copy copy) {
  if (num_chunks == 0) return 0;
  int64_t count = 0;
  for (int64_t chunk; (chunk = ClaimByWarp(group, &group.launch->staging)) < num_chunks; ++count) {
    copy(chunk);
  }
  return CompleteStaging(group, epoch, count, num_chunks);
}

// Adds items that are done. True for the thread that completes all of them. To have told the peers
// is an item too: the next call must not overtake it.
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
#pragma unroll 1
  for (int offset = 1; must_wait && offset < group.num_ranks; ++offset) {
    int peer = Peer(group, offset);
    const uint64_t* flag = &OwnControl(group)->consumed[peer];
    if (!WaitForFlag(group, flag, epoch, Phase::kFinish, peer)) return;
  }
  GiveTurn(group, 2 * epoch);
}

// All threads of every block, once its work is done and visible to it. last_words(): what a thread
// still says to others, beside the one that counts blocks.
template <typename Words, typename Poison>
__device__ void End(const GroupView& group, Words last_words, Poison poison) {
  LaunchState* launch = group.launch;
  __shared__ bool is_last, is_poisoned;
  __syncthreads();
  last_words();
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

template <typename Poison>
__device__ void End(const GroupView& group, Poison poison) {
  End(group, [] {}, poison);
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
