// combine's backward in a group with bulk copies: one half of the warps claims pulls and loads
// their tiles, in the other half rows meet their gradient.

#ifndef JAX_MOE_EP_COMBINE_BACKWARD_GROUP_BULK_CUH_
#define JAX_MOE_EP_COMBINE_BACKWARD_GROUP_BULK_CUH_

#include "combine_backward_group.cuh"
#include "tile_ring.cuh"

namespace jax_moe_ep {
namespace {

// A tile of a token's gradient, or rows of y that it meets.
struct alignas(16) BackwardNote {
  enum : uint32_t { kGradient = 1, kRows = 2, kEnd = 4 };
  uint32_t what;
  int num_tiles;
  int bytes;        // of each
  int num_claimed;  // with kEnd: pulls that are done now, 0 when a rank gave up
  uint32_t rows;    // with the last tiles of the pull: a bit a k that has a row here
  float* dweights;  // likewise: of its token
};
struct BackwardTileNote {
  int k;
  float weight;
  void* dy;
};
using BackwardRings = Rings<BackwardNote, BackwardTileNote>;
using BackwardWriter = RingWriter<BackwardNote, BackwardTileNote>;
using BackwardReader = RingReader<BackwardNote, BackwardTileNote>;

// A pull, and what it needs of its token.
struct BackwardPull : Pull {
  int32_t slot;   // of k = lane
  float weight;   // likewise
  uint32_t rows;  // a bit a k
};

// The warp that fills a ring. The claim of a pull, and the load of its slots, are under way while
// the tiles of the one before are put; only then it waits for the weights.
template <typename T>
class BackwardFeeder {
 public:
  __device__ BackwardFeeder(const GroupBackwardParams<T>& p,
                            BackwardWriter& ring,
                            WarpClaims& claims,
                            uint64_t epoch)
      : p_(p), ring_(ring), claims_(claims), epoch_(epoch) {}

  // All pulls that the warp claims. Returns the first claim that is no pull, kNoItem when a rank
  // gave up.
  __device__ int64_t Feed() {
    Take();
    while (FindNext()) {
      BackwardPull now = next_;
      Take();
      PutPull(now);
    }
    BackwardNote note{};
    note.what = BackwardNote::kEnd;
    note.num_claimed = is_fine_ ? num_claimed_ : 0;
    ring_.Put(0, 0, note, -1, nullptr, {});
    return is_fine_ ? position_ : kNoItem;
  }

 private:
  __device__ int lane() const { return threadIdx.x % kWarpSize; }

  // The next claim. A pull's slots are loaded.
  __device__ void Take() {
    position_ = claims_.Next();
    if (position_ >= p_.num_pulls()) return;
    ++num_claimed_;
    static_cast<Pull&>(next_) = p_.PullAt(position_);
    next_.slot = -1;
    if (lane() < p_.plan.top_k) next_.slot = p_.Slots(next_.source, next_.token)[lane()];
  }

  // Goes on from the claim to a pull with rows here, and loads its weights. False without one, or
  // when a rank gave up.
  __device__ bool FindNext() {
    for (; position_ < p_.num_pulls(); Take()) {
      next_.rows = __ballot_sync(kAllLanes, next_.slot >= 0);
      if (next_.rows == 0) continue;
      is_fine_ = ready_.Wait(p_.group, epoch_, next_.source) &&
                 p_.LoadWeights(next_.source, next_.token, epoch_, &next_.weight);
      return is_fine_;
    }
    return false;
  }

  // For some columns after others: the gradient's tile, then those of the rows in the order of k;
  // lane k puts its row.
  __device__ void PutPull(const BackwardPull& now) {
    int num_rows = __popc(now.rows);
    int row = now.slot >= 0 ? __popc(now.rows & ((1u << lane()) - 1)) : -1;
    int64_t row_bytes = p_.hidden * sizeof(T), start = now.slot * row_bytes;
    const T* gradients = p_.Gradients(now.source, epoch_) + now.token * p_.hidden;
    const char* gradient = reinterpret_cast<const char*>(gradients);
    const char* y = reinterpret_cast<const char*>(p_.y) + start;
    char* dy = reinterpret_cast<char*>(p_.dy) + start;
    for (int64_t column = now.first_byte; column < now.end_byte; column += kTileBytes) {
      int bytes = static_cast<int>(min(int64_t{kTileBytes}, now.end_byte - column));
      ring_.Put(1, bytes, {BackwardNote::kGradient, 1, bytes}, lane(), gradient + column, {});
      for (int begin = 0; begin < num_rows; begin += kGroupTiles) {
        int num_tiles = min(num_rows - begin, kGroupTiles);
        BackwardNote note{BackwardNote::kRows, num_tiles, bytes};
        if (begin + num_tiles == num_rows && column + kTileBytes >= now.end_byte) {
          note.rows = now.rows;
          note.dweights = p_.WeightGradients(now, epoch_);
        }
        ring_.Put(
            num_tiles, bytes, note, row - begin, y + column, {lane(), now.weight, dy + column});
      }
    }
  }

  const GroupBackwardParams<T>& p_;
  BackwardWriter& ring_;
  WarpClaims& claims_;
  uint64_t epoch_;
  WarpReady ready_;
  bool is_fine_ = true;
  int num_claimed_ = 0;
  int64_t position_ = 0;
  BackwardPull next_{};
};

// The gradient's tile, and the dot products of the pull so far.
template <typename T>
struct TileGradient {
  Vec<T> gradient[kTileVectors] = {};
  float dot = 0;  // of k = lane

  __device__ void Take(const uint4* tile) {
#pragma unroll
    for (int i = 0; i < kTileVectors; ++i) {
      gradient[i] = Vec<T>::Load(reinterpret_cast<const T*>(tile), TilePlace(i));
    }
  }

  // Writes the tile of dy, and adds the tile's part to the dot product of its k.
  __device__ void Meet(const uint4* tile, int bytes, const BackwardTileNote& note) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kTileVectors; ++i) {
      if (TilePlace(i) * kVecBytes >= bytes) continue;
      Vec<T> y = Vec<T>::Load(reinterpret_cast<const T*>(tile), TilePlace(i));
      float scaled[Vec<T>::kSize];
#pragma unroll
      for (int j = 0; j < Vec<T>::kSize; ++j) {
        float g = gradient[i].Get(j);
        sum += g * y.Get(j);
        scaled[j] = __fmul_rn(note.weight, g);
      }
      Vec<T>::Round(scaled).Store(static_cast<T*>(note.dy), TilePlace(i));
    }
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, step);
    }
    if (threadIdx.x % kWarpSize == note.k) dot += sum;
  }

  __device__ void EndPull(const BackwardNote& note) {
    int lane = threadIdx.x % kWarpSize;
    if (note.rows >> lane & 1) note.dweights[lane] = dot;
    dot = 0;
  }
};

// A chunk of this rank's weight gradients by a warp, once all ranks have returned theirs. False
// when a rank gave up.
template <typename T>
__device__ bool CollectByWarp(const GroupBackwardParams<T>& p, uint64_t epoch, int64_t chunk) {
  int lane = threadIdx.x % kWarpSize;
  bool is_there = true;
  if (lane < p.group.num_ranks) {
    const uint64_t* flag = &OwnControl(p.group)->returned[lane];
    is_there = WaitForFlag(p.group, flag, epoch, Phase::kReturned, lane);
  }
  if (__any_sync(kAllLanes, !is_there)) return false;
  __syncwarp();  // each lane has acquired for all
  WarpChunk<int32_t> owners(chunk, p.num_weights());
  WarpChunk<float> gradients(chunk, p.num_weights());
  owners.Load(p.owners);
  gradients.Load(p.WeightGradients(p.group.rank, 0, epoch));
#pragma unroll 1
  for (int64_t part = 1; part < p.parts.count; ++part) {
    WarpChunk<float> more(chunk, p.num_weights());
    more.Load(p.WeightGradients(p.group.rank, part, epoch));
#pragma unroll
    for (int j = 0; j < kUnitsPerLane; ++j) gradients.units[j] += more.units[j];
  }
#pragma unroll
  for (int j = 0; j < kUnitsPerLane; ++j) {
    if (owners.units[j] < 0) gradients.units[j] = 0;
  }
  gradients.Store(p.dweights);
  return true;
}

// One thread: adds items that end the call. True when they are the last: it has told the peers, and
// must still Finish.
template <typename T>
__device__ bool CompleteLast(const GroupBackwardParams<T>& p, uint64_t epoch, int64_t count) {
  if (!Complete(&p.group.launch->done, count, p.num_last_items())) return false;
  TellConsumed(p.group, epoch);
  return true;
}

// Uses what another warp puts into the ring. Rows are zeroed in between, so that memory has work
// while pulls wait for the link. num_sent: what the thread has told peers. True for the thread that
// must still Finish.
template <typename T>
__device__ bool UsePulls(const GroupBackwardParams<T>& p,
                         BackwardReader& ring,
                         uint64_t epoch,
                         const uint4* zeros,
                         int64_t num_sent) {
  TileGradient<T> gradient;
  int64_t row, row_bytes = p.hidden * sizeof(T);
  int64_t worker = int64_t{RingOfWarp()} * gridDim.x + blockIdx.x;
  ZeroRows zero(p.plan, worker, int64_t{gridDim.x} * kRings);
  char* dy = reinterpret_cast<char*>(p.dy);
  int64_t count;
  for (;;) {
    BackwardNote note = ring.Front();
    if (note.what & BackwardNote::kGradient) gradient.Take(ring.Tile(0));
    if (note.what & BackwardNote::kRows) {
#pragma unroll 1
      for (int n = 0; n < note.num_tiles; ++n) {
        gradient.Meet(ring.Tile(n), note.bytes, ring.NoteOf(n));
      }
    }
    ring.Pop(note.num_tiles);
    count = note.num_claimed;
    if (note.what & BackwardNote::kEnd) break;
    if (note.dweights == nullptr) continue;
    gradient.EndPull(note);
    if (zero.Next(&row)) {
      BulkZeroRow(dy + row * row_bytes, row_bytes, zeros, kTileBytes);
      ptx::BulkCommitGroup();
    }
  }
  __syncwarp();
  if (threadIdx.x % kWarpSize == 0) CompletePulls(p, epoch, count);
  bool is_last = CompleteLast(p, epoch, num_sent);
  while (zero.Next(&row)) {
    BulkZeroRow(dy + row * row_bytes, row_bytes, zeros, kTileBytes);
  }
  ptx::BulkCommitGroup();
  ptx::BulkWaitAll();
  return is_last;
}

// As GroupCombineBackwardKernel, for at most kMaxBulkTopK experts a token. Launch: any number of
// blocks of kRingThreads, with kRingBytes of shared memory.
template <typename T>
__global__ void __launch_bounds__(kRingThreads, 1)
    GroupCombineBackwardBulkKernel(const __grid_constant__ GroupBackwardParams<T> p) {
#if __CUDA_ARCH__ >= 900  // older ones are never launched with it
  extern __shared__ __align__(128) char tiles[];
  __shared__ BackwardRings rings;
  __shared__ uint4 zeros[kTileBytes / kVecBytes];
  __shared__ BlockCall call;
  FewWeightsSender weights(p, SendsWeights());
  if (FillsRing()) {
    for (int i = threadIdx.x - kRingThreads / 2; i < kTileBytes / kVecBytes;
         i += kRingThreads / 2) {
      zeros[i] = make_uint4(0, 0, 0, 0);
    }
  }
  rings.Init();
  Begun begun = Begin(p.group, p.num_staged() > 0, call);
  uint64_t epoch = begun.epoch;
  if (epoch != kAborted) {
    int64_t num_sent = begun.num_told + weights.Send(epoch) + StageGradients(p, epoch);
    bool is_last;
    if (FillsRing()) {
      WarpClaims claims(p.group);
      BackwardWriter ring(tiles, rings);
      int64_t position = BackwardFeeder<T>(p, ring, claims, epoch).Feed();
      int64_t chunks = 0, num_items = p.num_pulls() + p.num_weight_chunks();
      for (; position < num_items; position = claims.Next(), ++chunks) {
        if (!CollectByWarp(p, epoch, position - p.num_pulls())) break;
      }
      __syncwarp();
      is_last = CompleteLast(p, epoch, num_sent + (threadIdx.x % kWarpSize == 0 ? chunks : 0));
    } else {
      BackwardReader ring(tiles, rings);
      is_last = UsePulls(p, ring, epoch, zeros, num_sent);
    }
    if (is_last) Finish(p.group, epoch, p.group.is_read_in_place());
  }
  End(p.group, [&] {
    PoisonByBlock(p.dy, p.plan.capacity * p.hidden * sizeof(T));
    PoisonByBlock(p.dweights, p.num_weights() * sizeof(float));
  });
#endif
}

}  // namespace
}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_COMBINE_BACKWARD_GROUP_BULK_CUH_
