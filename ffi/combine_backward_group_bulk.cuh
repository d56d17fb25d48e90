// combine's backward in a group with bulk copies: every warp claims tokens, and has a ring of tiles
// that are loading while earlier ones meet their gradient.

#ifndef JAX_MOE_EP_COMBINE_BACKWARD_GROUP_BULK_CUH_
#define JAX_MOE_EP_COMBINE_BACKWARD_GROUP_BULK_CUH_

#include "combine_backward_group.cuh"
#include "tile_ring.cuh"

namespace jax_moe_ep {
namespace {

// A tile of a token's gradient, or rows of y that it meets.
struct BackwardNote {
  bool is_gradient;
  int num_tiles;
  int bytes;        // of each
  uint32_t rows;    // with the last tiles of the token: a bit a k that has a row here
  float* dweights;  // likewise: of the token
};
struct BackwardTileNote {
  int k;
  float weight;
  void* dy;
};
using BackwardRing = TileRing<BackwardNote, BackwardTileNote>;

// A token of any rank that has rows here.
struct BackwardToken {
  int source;
  int64_t token;
  int32_t slot;   // of k = lane
  float weight;   // likewise
  uint32_t rows;  // a bit a k
};

// What a warp feeds its ring with. The claim of a token, and the loads of its slots and weights,
// are under way while the token before is fed.
template <typename T>
class BackwardFeeder {
 public:
  __device__ BackwardFeeder(const GroupBackwardParams<T>& p,
                            BackwardRing& ring,
                            WarpClaims& claims,
                            uint64_t epoch)
      : p_(p), ring_(ring), claims_(claims), epoch_(epoch) {
    Prepare();
  }

  // Until the ring is full or there are no more tokens. False when a rank gave up.
  __device__ bool Feed() {
    while (BeginToken() && PutGroup()) {
    }
    return is_fine_;
  }

  __device__ int64_t num_claimed() const { return num_claimed_; }

  // The first claim that is no pull, and those after it.
  __device__ int64_t position() const { return position_; }
  __device__ int64_t NextPosition() { return position_ = claims_.Next(); }

 private:
  // Takes claims up to the next token with rows.
  __device__ void Prepare() {
    has_next_ = false;
    while (is_fine_ && !has_next_) {
      position_ = claims_.Next();
      if (position_ >= p_.num_pulls()) return;
      ++num_claimed_;
      Load();
    }
  }

  __device__ void Load() {
    const GroupView& group = p_.group;
    p_.order.Find(group.rank, group.num_ranks, position_, &next_.source, &next_.token);
    int lane = threadIdx.x % kWarpSize, top_k = p_.plan.top_k;
    int64_t place = next_.token * top_k + lane;
    next_.slot = -1;
    if (lane < top_k) {
      next_.slot = p_.plan.slots[next_.source * p_.plan.num_tokens * top_k + place];
    }
    next_.rows = __ballot_sync(kAllLanes, next_.slot >= 0);
    if (next_.rows == 0) return;
    is_fine_ = ready_.Wait(group, epoch_, next_.source);
    if (!is_fine_) return;
    if (lane < top_k) next_.weight = p_.Weights(next_.source, epoch_)[place];
    has_next_ = true;
  }

  // Whether there are tiles to put.
  __device__ bool BeginToken() {
    if (is_in_token_) return true;
    if (!has_next_) return false;
    now_ = next_;
    is_in_token_ = true;
    num_put_ = 0;
    column_ = 0;
    int lane = threadIdx.x % kWarpSize;
    batch_ = 1 + __popc(now_.rows);
    place_ = now_.slot >= 0 ? 1 + __popc(now_.rows & ((1u << lane) - 1)) : -1;
    const T* gradients = p_.Gradients(now_.source, epoch_) + now_.token * p_.hidden;
    gradient_ = reinterpret_cast<const char*>(gradients);
    Prepare();
    return true;
  }

  // A group of tiles of some columns: the gradient's alone, or rows in the order of k; lane k puts
  // its row. False when the ring is full.
  __device__ bool PutGroup() {
    bool is_gradient = num_put_ == 0;
    int num_tiles = is_gradient ? 1 : min(batch_ - num_put_, kGroupTiles);
    if (!ring_.HasRoom(num_tiles)) return false;
    int lane = threadIdx.x % kWarpSize;
    int64_t row_bytes = p_.hidden * sizeof(T), start = now_.slot * row_bytes + column_;
    int bytes = static_cast<int>(min(int64_t{kTileBytes}, row_bytes - column_));
    BackwardNote note{is_gradient, num_tiles, bytes, 0, nullptr};
    int end = num_put_ + num_tiles;
    if (end == batch_ && column_ + kTileBytes >= row_bytes) {
      note.rows = now_.rows;
      note.dweights = p_.WeightGradients(now_.source, epoch_) + now_.token * p_.plan.top_k;
    }
    int tile = (is_gradient ? lane : place_) - num_put_;
    const char* from = reinterpret_cast<const char*>(p_.y) + start;
    if (is_gradient) from = gradient_ + column_;
    BackwardTileNote tile_note{lane, now_.weight, reinterpret_cast<char*>(p_.dy) + start};
    ring_.Put(num_tiles, bytes, note, tile, from, tile_note);
    num_put_ = end;
    if (num_put_ < batch_) return true;
    num_put_ = 0;
    column_ += kTileBytes;
    is_in_token_ = column_ < row_bytes;
    return true;
  }

  const GroupBackwardParams<T>& p_;
  BackwardRing& ring_;
  WarpClaims& claims_;
  uint64_t epoch_;
  WarpReady ready_;
  bool is_fine_ = true;
  int64_t num_claimed_ = 0;
  int64_t position_ = 0;
  bool has_next_ = false;
  BackwardToken next_{};
  // What is being fed.
  BackwardToken now_{};
  bool is_in_token_ = false;
  int batch_ = 0;       // tiles of some columns
  int num_put_ = 0;     // of them
  int place_ = -1;      // in the batch, of this lane's row
  int64_t column_ = 0;  // in bytes
  const char* gradient_ = nullptr;
};

// The gradient's tile, and the dot products of the token so far.
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

  __device__ void EndToken(const BackwardNote& note) {
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
  gradients.Load(p.WeightGradients(p.group.rank, epoch));
#pragma unroll
  for (int j = 0; j < kUnitsPerLane; ++j) {
    if (owners.units[j] < 0) gradients.units[j] = 0;
  }
  gradients.Store(p.dweights);
  return true;
}

// As GroupCombineBackwardKernel, for at most kMaxBulkTopK experts a token. Rows are zeroed in
// between, so that memory has work while pulls wait for the link. Launch: any number of blocks of
// kBulkWarps warps, with kRingBytes of shared memory.
template <typename T>
__global__ void __launch_bounds__(kBulkWarps* kWarpSize, 1)
    GroupCombineBackwardBulkKernel(const __grid_constant__ GroupBackwardParams<T> p) {
#if __CUDA_ARCH__ >= 900  // older ones are never launched with it
  extern __shared__ __align__(128) char tiles[];
  __shared__ RingNotes<BackwardNote, BackwardTileNote> notes;
  __shared__ uint4 zeros[kTileBytes / kVecBytes];
  __shared__ uint64_t epoch;
  int warp = threadIdx.x / kWarpSize;
  BackwardRing ring(tiles, notes);
  for (int i = threadIdx.x; i < kTileBytes / kVecBytes; i += blockDim.x) {
    zeros[i] = make_uint4(0, 0, 0, 0);
  }
  ptx::FenceProxyAsyncShared();
  WarpClaims claims(p.group);
  if (threadIdx.x == 0) epoch = Begin(p.group, true, nullptr);
  __syncthreads();
  if (epoch != kAborted) {
    StageGradients(p, epoch);
    BackwardFeeder<T> feeder(p, ring, claims, epoch);
    TileGradient<T> gradient;
    int64_t row, row_bytes = p.hidden * sizeof(T);
    ZeroRows zero(p.plan, int64_t{warp} * gridDim.x + blockIdx.x, int64_t{gridDim.x} * kBulkWarps);
    char* dy = reinterpret_cast<char*>(p.dy);
    bool goes_on = true;
    for (;;) {
      if (goes_on && ring.IsHalfEmpty()) goes_on = feeder.Feed();
      if (ring.IsEmpty()) break;
      BackwardNote note = ring.Front();
      if (note.is_gradient) {
        gradient.Take(ring.Tile(0));
      } else {
#pragma unroll 1
        for (int n = 0; n < note.num_tiles; ++n) {
          gradient.Meet(ring.Tile(n), note.bytes, ring.NoteOf(n));
        }
      }
      ring.Pop(note.num_tiles);
      if (note.dweights == nullptr) continue;
      gradient.EndToken(note);
      if (zero.Next(&row)) {
        BulkZeroRow(dy + row * row_bytes, row_bytes, zeros, kTileBytes);
        ptx::BulkCommitGroup();
      }
    }
    __syncwarp();
    bool is_first_lane = threadIdx.x % kWarpSize == 0;
    if (goes_on && is_first_lane) CompletePulls(p, epoch, feeder.num_claimed());
    while (zero.Next(&row)) {
      BulkZeroRow(dy + row * row_bytes, row_bytes, zeros, kTileBytes);
    }
    ptx::BulkCommitGroup();
    int64_t chunks = 0, num_items = p.num_pulls() + p.num_table_chunks();
    for (; goes_on && feeder.position() < num_items; feeder.NextPosition(), ++chunks) {
      goes_on = CollectByWarp(p, epoch, feeder.position() - p.num_pulls());
    }
    ptx::BulkWaitAll();
    __syncwarp();
    bool is_last =
        goes_on && is_first_lane && Complete(&p.group.launch->done, chunks, p.num_table_chunks());
    if (is_last) {
      TellConsumed(p.group, epoch);
      Finish(p.group, epoch, p.group.is_one_process);
    }
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
