// dispatch with bulk copies: tiles pass through shared memory, and no thread touches them.

#ifndef JAX_MOE_EP_DISPATCH_BULK_CUH_
#define JAX_MOE_EP_DISPATCH_BULK_CUH_

#include "dispatch_params.cuh"

namespace jax_moe_ep {
namespace {

// Bulk path: each warp runs its own ring of stages in shared memory. A tile is loaded kPrefetch
// items ahead; when it has landed, every lane stores it to its own k's row.
constexpr int kMoveWarps = 4;
constexpr int kStages = 4;
constexpr int kPrefetch = 2;
constexpr int kMaxTileBytes = 12 * 1024;  // 4 warps x 4 stages and a tile of zeros: 204 KB of 227
static_assert(kPrefetch < kStages, "the other stages hold stores that are still reading");

// One warp's ring.
struct Ring {
  char* stages;           // [kStages, tile_bytes]
  uint64_t* barriers;     // [kStages]
  uint32_t parities = 0;  // a bit a stage: of its next wait
  uint32_t loaded = 0;    // a bit a stage: whether something is loading or loaded

  // Starts a load; without bytes there is none.
  __device__ void Load(const DispatchParams& p, int stage, const char* from, uint32_t bytes) {
    loaded = (loaded & ~(1u << stage)) | (bytes != 0 ? 1u << stage : 0);
    if (bytes == 0 || threadIdx.x % kWarpSize != 0) return;
    ptx::MbarrierArriveExpectBytes(&barriers[stage], bytes);
    ptx::BulkLoad(Data(p, stage), from, bytes, &barriers[stage]);
  }

  // Edge 3. Waits for the load of a stage; false when there was none.
  __device__ bool Wait(int stage) {
    if (!(loaded >> stage & 1)) return false;
    ptx::MbarrierWait(&barriers[stage], parities >> stage & 1);
    parities ^= 1u << stage;
    return true;
  }

  __device__ char* Data(const DispatchParams& p, int stage) const {
    return stages + int64_t{stage} * p.tile_bytes;
  }
};

// next() gives numbers up to `end`; load(number, stage) starts what store(number, stage) then sends
// on, as one group a lane. Returns how many there were; the stores may still be reading.
template <typename Next, typename Load, typename Store>
__device__ int64_t Pipe(int64_t end, Next next, Load load, Store store) {
  int64_t count = 0;
  int64_t pending[kPrefetch];  // loading, oldest first
#pragma unroll 1
  for (int turn = 0;; ++turn) {
    if (turn >= kPrefetch) {
      if (pending[0] >= end) return count;
      store(pending[0], (turn - kPrefetch) % kStages);
      ptx::BulkCommitGroup();
      ++count;
      // The stage of the next load was last read by the stores of kStages - kPrefetch items ago.
      ptx::BulkWaitGroupRead<kStages - kPrefetch>();
      __syncwarp();
    }
#pragma unroll
    for (int n = 1; n < kPrefetch; ++n) pending[n - 1] = pending[n];
    pending[kPrefetch - 1] = next();
    if (pending[kPrefetch - 1] < end) load(pending[kPrefetch - 1], turn % kStages);
  }
}

// All items of a warp. Returns how many there were. A row is zeroed beside each, so that memory has
// work while others wait for the link.
template <bool kInGroup>
__device__ int64_t MoveItems(const DispatchParams& p,
                             WarpItems<kInGroup>& items,
                             Ring& ring,
                             ZeroRows& zero,
                             const char* zeros) {
  auto load = [&](int64_t item, int stage) {
    Tile<kInGroup> tile(p, item);
    bool has_row = tile.HasRow(p) && items.IsReady(p, tile.source);  // others are not read
    ring.Load(p, stage, has_row ? tile.Data(p, items.epoch) : nullptr, has_row ? tile.bytes : 0);
  };
  auto store = [&](int64_t item, int stage) {
    int64_t row;
    if (zero.Next(&row)) BulkZeroRow(p.rows + row * p.row_bytes, p.row_bytes, zeros, p.tile_bytes);
    if (!ring.Wait(stage)) return;
    Tile<kInGroup> tile(p, item);
#pragma unroll 1
    for (int k = threadIdx.x % kWarpSize; k < p.plan.top_k; k += kWarpSize) {
      row = tile.Slots(p)[k];
      if (row < 0) continue;
      ptx::BulkStore(p.rows + row * p.row_bytes + tile.offset, ring.Data(p, stage), tile.bytes);
    }
  };
  return Pipe(NumItems<kInGroup>(p), [&] { return items.Next(); }, load, store);
}

// Copies x to where peers read it, a tile at a time, as all warps claim them; then they are told.
// The ring as it is then, and whether the lane has told them.
struct StagedByBulk {
  Ring ring;
  int num_told;
};
__device__ __noinline__ StagedByBulk StageByBulk(const DispatchParams& p,
                                                 uint64_t epoch,
                                                 Ring ring) {
  char* to = Half(p.group, p.group.rank, epoch) + p.staging_offset;
  int64_t bytes = p.plan.num_tokens * p.row_bytes;
  auto size = [&](int64_t tile) {
    return static_cast<uint32_t>(min(int64_t{p.tile_bytes}, bytes - tile * p.tile_bytes));
  };
  int64_t count = Pipe(
      p.num_chunks,
      [&] { return ClaimByWarp(p.group, &p.group.launch->staging); },
      [&](int64_t tile, int stage) { ring.Load(p, stage, p.x + tile * p.tile_bytes, size(tile)); },
      [&](int64_t tile, int stage) {
        ring.Wait(stage);
        if (threadIdx.x % kWarpSize != 0) return;
        ptx::BulkStore(to + tile * p.tile_bytes, ring.Data(p, stage), size(tile));
      });
  ptx::BulkWaitAll();
  int num_told = CompleteStaging(p.group, epoch, count, p.num_chunks);
  ring.loaded = 0;
  return {ring, num_told};
}

// Inputs: plan, x of all ranks; writes rows. Launch: any number of blocks of kMoveWarps warps, with
// kMoveWarps * kStages + 1 tiles of shared memory. What is written does not depend on the order of
// blocks. In a group the steps are those of protocol.cuh; this rank's x is not written before
// all peers have read it.
//
// Example (T = 2, K = 2, C = 4): slots (2 0) (-1 3), group_counts (1 2), group_sizes (2 2),
// x = a, b gives rows a 0 a b.
template <bool kInGroup>
__global__ void __launch_bounds__(kMoveWarps* kWarpSize, 1)
    DispatchBulkKernel(const __grid_constant__ DispatchParams p) {
#if __CUDA_ARCH__ >= 900                          // older ones are never launched with it
  extern __shared__ __align__(128) char tiles[];  // zeros, then the rings
  __shared__ uint64_t barriers[kMoveWarps][kStages];
  __shared__ BlockCall call;
  Begun begun{};
  int warp = threadIdx.x / kWarpSize;
  char* stages = tiles + (int64_t{1} + int64_t{warp} * kStages) * p.tile_bytes;
  Ring ring{stages, barriers[warp]};

  // By the warps that do not begin the call meanwhile.
  if (warp > 0) {
    int thread = threadIdx.x - kWarpSize;
    if (thread < kMoveWarps * kStages) ptx::MbarrierInit(&barriers[0][thread], 1);
#pragma unroll 1
    for (int i = thread; i < p.tile_bytes / kVecBytes; i += blockDim.x - kWarpSize) {
      reinterpret_cast<uint4*>(tiles)[i] = make_uint4(0, 0, 0, 0);
    }
    ptx::FenceProxyAsyncShared();
  }
  // Neighbouring items go to different SMs.
  int64_t worker = int64_t{warp} * gridDim.x + blockIdx.x;
  int64_t num_workers = int64_t{gridDim.x} * kMoveWarps;
  WarpItems<kInGroup> items(p, worker, num_workers);
  if constexpr (kInGroup) {
    begun = Begin(p.group, p.num_chunks > 0, call);
  } else {
    __syncthreads();
  }
  uint64_t epoch = begun.epoch;
  if (epoch != kAborted) {
    if constexpr (kInGroup) {
      items.epoch = epoch;
      if (p.num_chunks > 0) {
        StagedByBulk staged = StageByBulk(p, epoch, ring);
        ring = staged.ring;
        begun.num_told = staged.num_told;
      }
    }
    ZeroRows zero(p.plan, worker, num_workers);
    int64_t count = MoveItems(p, items, ring, zero, tiles);
    bool is_last = false;
    // All loads have landed.
    if constexpr (kInGroup) is_last = CompleteItems(p, epoch, count + begun.num_told);
    for (int64_t row; zero.Next(&row);) {
      BulkZeroRow(p.rows + row * p.row_bytes, p.row_bytes, tiles, p.tile_bytes);
    }
    ptx::BulkCommitGroup();
    ptx::BulkWaitAll();
    if (is_last) Finish(p.group, epoch, p.group.is_read_in_place());
  }
  if constexpr (kInGroup) {
    End(p.group, [&] { PoisonByBlock(p.rows, p.plan.capacity * p.row_bytes); });
  }
#endif
}

}  // namespace
}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_DISPATCH_BULK_CUH_
