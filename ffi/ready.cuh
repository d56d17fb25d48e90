// In which call the ranks are, and where the data of each can be read: how they tell, how they
// wait.

#ifndef JAX_MOE_EP_READY_CUH_
#define JAX_MOE_EP_READY_CUH_

#include <cstring>

#include "ptx.cuh"
#include "rows.cuh"
#include "tagged_words.cuh"

namespace jax_moe_ep {

// Where x is, in units of 16 bytes, or 0: staged. Two words have the bits of any address.
using PlaceWords = TaggedWords<27>;
using SignatureWords = TaggedWords<16>;

// A warp tells its peers in which call this rank is.
static __device__ __noinline__ void SendSignature(const GroupView& group, uint64_t epoch) {
  int lane = threadIdx.x % kWarpSize;
  if (lane >= kSignatureWords) return;
  uint16_t parts[kSignatureWords];
  memcpy(parts, &group.signature, sizeof(parts));
#pragma unroll 1
  for (int offset = 1; offset < group.num_ranks; ++offset) {
    uint64_t* there = group.controls[Peer(group, offset)]->signatures[epoch & 1][group.rank];
    StoreRelaxedSystem(&there[lane], SignatureWords(epoch).Make(parts[lane]));
  }
}

// Edge 1. A warp tells its peers where this rank's data is. A fence of all lanes has come after all
// that the peers will read.
__device__ inline void SendPlaces(const GroupView& group, uint64_t epoch) {
  int lane = threadIdx.x % kWarpSize, peer = lane / 2, half = lane % 2;
  static_assert(2 * kMaxRanks <= kWarpSize);
  if (peer >= group.num_ranks || peer == group.rank) return;
  uint64_t place = reinterpret_cast<uint64_t>(group.published[peer]) / kVecBytes;
  if (half == 1) place /= PlaceWords::kMask + 1;
  uint64_t* there = group.controls[peer]->places[epoch & 1][group.rank];
  StoreRelaxedSystem(&there[half], PlaceWords(group, epoch).Make(place));
}

// Both. The warp has seen all that the peers will read.
__device__ inline void Publish(const GroupView& group, uint64_t epoch) {
  FenceSystem();
  SendPlaces(group, epoch);
  SendSignature(group, epoch);
}

__device__ inline bool AreEqual(const CallSignature& a, const CallSignature& b) {
  return a.op == b.op && a.top_k == b.top_k && a.num_tokens == b.num_tokens &&
         a.row_bytes == b.row_bytes && a.options == b.options;
}

// The peer's signature from its words. False when they are not all of this epoch.
__device__ inline bool ReadSignature(const uint64_t* words,
                                     uint64_t epoch,
                                     CallSignature* signature) {
  uint16_t parts[kSignatureWords];
  bool is_there = true;
  for (int i = 0; i < kSignatureWords; ++i) {
    uint64_t word = LoadRelaxedSystem(&words[i]);
    is_there &= SignatureWords(epoch).Has(word);
    parts[i] = static_cast<uint16_t>(SignatureWords::Number(word));
  }
  memcpy(signature, parts, sizeof(parts));
  return is_there;
}

// Until the peer, which is late or in another call, has sent the words of this one; any thread.
// False when it is in another one, or a rank gave up.
static __device__ __noinline__ bool WaitLongForWords(const GroupView& group,
                                                     uint64_t epoch,
                                                     int peer,
                                                     const AwaitedWords& words) {
  const uint64_t* signature = OwnControl(group)->signatures[epoch & 1][peer];
  Failure failure{};
  failure.phase = Phase::kReady;
  failure.peer = peer;
  failure.expected = epoch;
  bool is_other = false;
  auto is_over = [&] {
    if (!ReadSignature(signature, epoch, &failure.theirs)) return false;
    is_other = !AreEqual(failure.theirs, group.signature);
    return is_other || words.HaveCome();
  };
  auto seen = [&] { return LoadRelaxedSystem(signature) / (SignatureWords::kMask + 1); };
  if (!WaitUntil(group, is_over, seen, failure)) return false;
  if (!is_other) return true;
  failure.kind = FailureKind::kMismatch;
  Fail(group, failure);
  return false;
}

// Any thread: until it has the peer's words of this call, which has_come() looks for. False as
// above.
template <typename HasCome>
__device__ bool WaitForWords(
    const GroupView& group, uint64_t epoch, int peer, const AwaitedWords& words, HasCome has_come) {
#pragma unroll 1
  for (int look = 0; look < kLooks; ++look) {
    if (has_come()) return true;
  }
  return WaitLongForWords(group, epoch, peer, words) && has_come();
}

// Edge 2. One thread: until the peer's data of this call can be read by it, or through a barrier by
// others. False when a rank gave up, or the peer is in another call.
__device__ inline bool WaitForReady(const GroupView& group, uint64_t epoch, int peer) {
  if (peer == group.rank) return true;
  PlaceWords words(group, epoch);
  const uint64_t* here = OwnControl(group)->places[epoch & 1][peer];
  bool is_fine = WaitForWords(group, epoch, peer, words.At(here, 2), [&] {
    uint64_t low = LoadRelaxedSystem(&here[0]);  // under way beside the other
    return words.Has(LoadAcquireSystem(&here[1])) && words.Has(low);
  });
  ptx::FenceProxyAsync();
  return is_fine;
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
  const uint64_t* words = OwnControl(group)->places[epoch & 1][source];
  uint64_t low = PlaceWords::Number(LoadRelaxedSystem(&words[0]));
  uint64_t high = PlaceWords::Number(LoadRelaxedSystem(&words[1]));
  uint64_t place = low + high * (PlaceWords::kMask + 1);
  if (place == 0) return Half(group, source, epoch) + staging_offset;
  return reinterpret_cast<const char*>(place * kVecBytes);
}

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_READY_CUH_
