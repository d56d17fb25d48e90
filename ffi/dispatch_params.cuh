// What dispatch's kernels share: how the work is cut, and which token a piece belongs to.

#ifndef JAX_MOE_EP_DISPATCH_PARAMS_CUH_
#define JAX_MOE_EP_DISPATCH_PARAMS_CUH_

#include "protocol.cuh"
#include "rows.cuh"

namespace jax_moe_ep {
namespace {

// A work item is a (token, tile): a tile is a part of a row, so that any row length fits.
struct DispatchParams {
  RowsPlan plan;
  const char* x;
  char* rows;
  int64_t row_bytes;
  int tile_bytes;
  int num_tiles;
  // In a group.
  GroupView group;
  PullOrder order;
  int64_t staging_offset;  // of x in a half of a region, unless peers read it where it is
  int64_t num_chunks;      // to stage: tiles with bulk copies, else of kChunkBytes
};

template <bool kInGroup>
__device__ int64_t NumItems(const DispatchParams& p) {
  int64_t tokens = kInGroup ? p.order.size(p.group.num_ranks) : p.plan.num_tokens;
  return tokens * p.num_tiles;
}

// One tile of one token.
template <bool kInGroup>
struct Tile {
  int source;             // the token's rank
  int64_t token, offset;  // among the tokens of its rank; in bytes
  int bytes;

  __device__ Tile(const DispatchParams& p, int64_t item) : source(0) {
    Division place = Divide(item, p.num_tiles);
    token = place.quotient;
    offset = place.remainder * p.tile_bytes;
    bytes = static_cast<int>(min(int64_t{p.tile_bytes}, p.row_bytes - offset));
    if constexpr (kInGroup) {
      p.order.Find(p.group.rank, p.group.num_ranks, token, &source, &token);
    }
  }

  __device__ const int32_t* Slots(const DispatchParams& p) const {
    return p.plan.slots + (source * p.plan.num_tokens + token) * p.plan.top_k;
  }

  // All lanes of a warp.
  __device__ bool HasRow(const DispatchParams& p) const {
    bool has = false;
#pragma unroll 1
    for (int k = threadIdx.x % kWarpSize; k < p.plan.top_k; k += kWarpSize) {
      has |= Slots(p)[k] >= 0;
    }
    return __any_sync(kAllLanes, has);
  }

  // The source must be ready.
  __device__ const char* Data(const DispatchParams& p, uint64_t epoch) const {
    const char* tokens = p.x;
    if constexpr (kInGroup) tokens = TokensOf(p.group, epoch, source, p.x, p.staging_offset);
    return tokens + token * p.row_bytes + offset;
  }
};

// A warp's items, in increasing order.
template <bool kInGroup>
struct WarpItems;

template <>
struct WarpItems<false> {
  uint64_t epoch = 0;
  int64_t worker;  // of num_workers warps of the launch
  int64_t num_workers;

  __device__ WarpItems(const DispatchParams&, int64_t worker, int64_t num_workers)
      : worker(worker), num_workers(num_workers) {}

  __device__ int64_t Next() {
    int64_t item = worker;
    worker += num_workers;
    return item;
  }
  __device__ bool IsReady(const DispatchParams&, int) { return true; }
};

// Claimed in a group: there nothing may wait for a warp that does not run.
template <>
struct WarpItems<true> {
  uint64_t epoch = 0;
  WarpClaims claims;
  WarpReady ready;

  __device__ WarpItems(const DispatchParams& p, int64_t, int64_t) : claims(p.group) {}

  __device__ int64_t Next() { return claims.Next(); }

  // Once all lanes can read the source's tokens. False when a rank gave up.
  __device__ bool IsReady(const DispatchParams& p, int source) {
    return ready.Wait(p.group, epoch, source);
  }
};

__device__ int StageX(const DispatchParams& p, uint64_t epoch) {
  uint4* to = reinterpret_cast<uint4*>(Half(p.group, p.group.rank, epoch) + p.staging_offset);
  int64_t vectors = p.plan.num_tokens * (p.row_bytes / kVecBytes);
  return Stage(p.group, epoch, p.num_chunks, [&](int64_t chunk) {
    CopyChunk(reinterpret_cast<const uint4*>(p.x), to, chunk, vectors);
  });
}

// Edge 4. When the warp has read the tokens of its items; their rows may still be written, for this
// rank alone. count: items, and whether the lane has told the peers. True for one lane of the
// launch, which has told the peers and must still Finish.
__device__ bool CompleteItems(const DispatchParams& p, uint64_t epoch, int64_t count) {
  __syncwarp();
  if (threadIdx.x % kWarpSize != 0) return false;
  if (!Complete(&p.group.launch->done, count, NumItems<true>(p) + 1)) return false;
  TellConsumed(p.group, epoch);
  return true;
}

}  // namespace
}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_DISPATCH_PARAMS_CUH_
