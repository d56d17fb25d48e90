// combine in a group with bulk copies: one half of the warps claims pieces and loads their tiles,
// the other adds them up.

#ifndef JAX_MOE_EP_COMBINE_GROUP_BULK_CUH_
#define JAX_MOE_EP_COMBINE_GROUP_BULK_CUH_

#include "combine_feeder.cuh"

namespace jax_moe_ep {
namespace {

// The sums of one tile: each lane has those of kTileVectors vectors. A short tile is added like a
// whole one, whatever lies behind its end, but not stored there.
template <typename T>
struct TileSums {
  static constexpr int kSize = Vec<T>::kSize;
  float own[kTileVectors][kSize] = {};  // this rank's partial
  float all[kTileVectors][kSize] = {};

  __device__ void AddRow(const uint4* tile, float weight) {
    Vec<T> vecs[kTileVectors];
    LoadTile(tile, vecs);
#pragma unroll
    for (int i = 0; i < kTileVectors; ++i) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        own[i][j] = __fadd_rn(own[i][j], __fmul_rn(weight, vecs[i].Get(j)));
      }
    }
  }

  __device__ void AddPartial(const uint4* tile) {
    Vec<T> vecs[kTileVectors];
    LoadTile(tile, vecs);
#pragma unroll
    for (int i = 0; i < kTileVectors; ++i) AddToSum(i, vecs[i]);
  }

  // This rank's partial is complete: for a peer, or for the sum.
  __device__ void SendPartial(const CombineNote& note) { Round(own, note); }
  __device__ void KeepPartial() {
#pragma unroll
    for (int i = 0; i < kTileVectors; ++i) {
      AddToSum(i, Vec<T>::Round(own[i]));
#pragma unroll
      for (int j = 0; j < kSize; ++j) own[i][j] = 0;
    }
  }

  __device__ void EndSum(const CombineNote& note) { Round(all, note); }

 private:
  __device__ static void LoadTile(const uint4* tile, Vec<T> (&vecs)[kTileVectors]) {
#pragma unroll
    for (int i = 0; i < kTileVectors; ++i) {
      vecs[i] = Vec<T>::Load(reinterpret_cast<const T*>(tile), TilePlace(i));
    }
  }

  __device__ void AddToSum(int i, const Vec<T>& vec) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) all[i][j] = __fadd_rn(all[i][j], vec.Get(j));
  }

  // Stores the rounded values and starts anew.
  __device__ static void Round(float (&values)[kTileVectors][kSize], const CombineNote& note) {
#pragma unroll
    for (int i = 0; i < kTileVectors; ++i) {
      Vec<T> rounded = Vec<T>::Round(values[i]);
      if (TilePlace(i) * kVecBytes < note.bytes) {
        rounded.Store(static_cast<T*>(note.out), TilePlace(i));
      }
#pragma unroll
      for (int j = 0; j < kSize; ++j) values[i][j] = 0;
    }
  }
};

// Adds up what another warp puts into the ring. Returns how many items are done, 0 when a rank gave
// up.
template <typename T>
__device__ int64_t AddUp(CombineReader& ring, uint64_t epoch) {
  TileSums<T> sums;
  for (;;) {
    CombineNote note = ring.Front();
    if (note.what & CombineNote::kRows) {
#pragma unroll 2
      for (int n = 0; n < note.num_tiles; ++n) sums.AddRow(ring.Tile(n), ring.NoteOf(n));
    }
    if (note.what & CombineNote::kPartials) {
#pragma unroll 1
      for (int n = 0; n < note.num_tiles; ++n) sums.AddPartial(ring.Tile(n));
    }
    ring.Pop(note.num_tiles);
    if (note.what & CombineNote::kSent) sums.SendPartial(note);
    if (note.what & CombineNote::kKept) sums.KeepPartial();
    if (note.what & CombineNote::kLastTile) sums.EndSum(note);
    __syncwarp();
    if (note.what & CombineNote::kEnd) return note.num_claimed;
    if (note.flag != nullptr && threadIdx.x % kWarpSize == 0) StoreReleaseSystem(note.flag, epoch);
  }
}

// As GroupCombineKernel, for at most kMaxBulkTopK experts a token. Launch: any number of blocks of
// kRingThreads, with kRingBytes of shared memory.
template <typename T>
__global__ void __launch_bounds__(kRingThreads, 1)
    GroupCombineBulkKernel(const __grid_constant__ GroupCombineParams<T> p) {
#if __CUDA_ARCH__ >= 900  // older ones are never launched with it
  extern __shared__ __align__(128) char tiles[];
  __shared__ CombineRings rings;
  __shared__ BlockCall call;
  FewWeightsSender weights(p, SendsWeights());
  rings.Init();
  Begun begun = Begin(p.group, p.num_staged_weights() > 0, call);
  uint64_t epoch = begun.epoch;
  bool is_last = false;
  if (epoch != kAborted) {
    int64_t count = begun.num_told + weights.Send(epoch) + StageWeights(p, epoch);
    if (FillsRing()) {
      WarpClaims claims(p.group);
      CombineWriter ring(tiles, rings);
      CombineFeeder<T>(p, ring, claims, epoch).Feed();
    } else {
      CombineReader ring(tiles, rings);
      int64_t num_items = AddUp<T>(ring, epoch);
      if (threadIdx.x % kWarpSize == 0) count += num_items;
    }
    is_last = Complete(&p.group.launch->done, count, p.num_items());
  }
  auto finish = [&] {
    if (!is_last) return;
    TellConsumed(p.group, epoch);
    Finish(p.group, epoch, false);
  };
  auto poison = [&] { PoisonByBlock(p.out, p.plan.num_tokens * p.hidden * sizeof(T)); };
  End(p.group, finish, poison);
#endif
}

}  // namespace
}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_COMBINE_GROUP_BULK_CUH_
