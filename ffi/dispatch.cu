#include "dispatch.h"
#include "ptx.cuh"
#include "rows.cuh"

namespace jax_moe_ep {
namespace {

// A work item is a (token, tile): a tile is a part of a row, so that any row length fits.
//
// Bulk path: each warp runs its own ring of stages in shared memory. A tile is loaded kPrefetch
// items ahead; when it has landed, every lane stores it to its own k's row.
constexpr int kBulkWarps = 4;
constexpr int kStages = 4;
constexpr int kPrefetch = 2;
constexpr int kMaxTileBytes = 12 * 1024;  // 4 warps x 4 stages and a tile of zeros: 204 KB of 227
static_assert(kPrefetch < kStages, "the other stages hold stores that are still reading");

constexpr int kVectorThreads = 256;
constexpr int kVectorsPerLane = 4;  // loads in flight
constexpr int kVectorBlocksPerSm = 8;

struct DispatchParams {
  RowsPlan plan;
  const char* x;
  char* rows;
  int64_t row_bytes;
  int tile_bytes;
  int num_tiles;
};

// One tile of one token.
struct Tile {
  int64_t token, offset;
  int bytes;
  __device__ Tile(const DispatchParams& p, int64_t item) {
    token = item / p.num_tiles;
    offset = item % p.num_tiles * p.tile_bytes;
    bytes = static_cast<int>(min(int64_t{p.tile_bytes}, p.row_bytes - offset));
  }
};

__device__ bool HasRow(const RowsPlan& plan, int64_t token) {
  bool has = false;
  for (int k = threadIdx.x % kWarpSize; k < plan.top_k; k += kWarpSize) {
    has |= plan.slots[token * plan.top_k + k] >= 0;
  }
  return __any_sync(kAllLanes, has);
}

// One warp's ring.
struct Ring {
  char* stages;           // [kStages, tile_bytes]
  uint64_t* barriers;     // [kStages]
  uint32_t parities = 0;  // a bit a stage: of its next wait
  uint32_t loaded = 0;    // a bit a stage: whether its item has a row here

  // Starts the load of an item; tokens without rows are not read.
  __device__ void Load(const DispatchParams& p, int64_t item, int64_t num_items, int stage) {
    loaded &= ~(1u << stage);
    if (item >= num_items) return;
    Tile tile(p, item);
    if (!HasRow(p.plan, tile.token)) return;
    loaded |= 1u << stage;
    if (threadIdx.x % kWarpSize != 0) return;
    ptx::MbarrierArriveExpectBytes(&barriers[stage], tile.bytes);
    ptx::BulkLoad(stages + int64_t{stage} * p.tile_bytes,
                  p.x + tile.token * p.row_bytes + tile.offset,
                  tile.bytes,
                  &barriers[stage]);
  }

  // Waits for the item and stores it to its rows, in one group a lane.
  __device__ void Store(const DispatchParams& p, int64_t item, int stage) {
    if (loaded >> stage & 1) {
      ptx::MbarrierWait(&barriers[stage], parities >> stage & 1);
      parities ^= 1u << stage;
      Tile tile(p, item);
      for (int k = threadIdx.x % kWarpSize; k < p.plan.top_k; k += kWarpSize) {
        int64_t row = p.plan.slots[tile.token * p.plan.top_k + k];
        if (row < 0) continue;
        ptx::BulkStore(p.rows + row * p.row_bytes + tile.offset,
                       stages + int64_t{stage} * p.tile_bytes,
                       tile.bytes);
      }
    }
    ptx::BulkCommitGroup();
  }
};

// Inputs: plan, x; writes rows. Launch: any number of blocks of kBulkWarps warps, with
// kBulkWarps * kStages + 1 tiles of shared memory. No block waits for another; what is written does
// not depend on the order of blocks.
//
// Example (T = 2, K = 2, C = 4): slots (2 0) (-1 3), group_counts (1 2), group_sizes (2 2),
// x = a, b gives rows a 0 a b.
__global__ void __launch_bounds__(kBulkWarps* kWarpSize, 1)
    DispatchBulkKernel(const __grid_constant__ DispatchParams p) {
#if __CUDA_ARCH__ >= 900                          // older ones are never launched with it
  extern __shared__ __align__(128) char tiles[];  // zeros, then the rings
  __shared__ uint64_t barriers[kBulkWarps][kStages];
  int warp = threadIdx.x / kWarpSize;
  char* stages = tiles + (int64_t{1} + int64_t{warp} * kStages) * p.tile_bytes;
  Ring ring{stages, barriers[warp]};

  if (threadIdx.x % kWarpSize == 0) {
    for (int stage = 0; stage < kStages; ++stage) ptx::MbarrierInit(&barriers[warp][stage], 1);
  }
  for (int i = threadIdx.x; i < p.tile_bytes / kVecBytes; i += blockDim.x) {
    reinterpret_cast<uint4*>(tiles)[i] = make_uint4(0, 0, 0, 0);
  }
  ptx::FenceProxyAsyncShared();
  __syncthreads();

  // Neighbouring items go to different SMs.
  int64_t worker = int64_t{warp} * gridDim.x + blockIdx.x;
  int64_t num_workers = int64_t{gridDim.x} * kBulkWarps;
  int64_t num_items = p.plan.num_tokens * p.num_tiles;
  for (int n = 0; n < kPrefetch; ++n) ring.Load(p, worker + n * num_workers, num_items, n);
  int stage = 0;
  for (int64_t item = worker; item < num_items; item += num_workers) {
    ring.Store(p, item, stage);
    // The stage of the next load was last read by the stores of kStages - kPrefetch items ago.
    ptx::BulkWaitGroupRead<kStages - kPrefetch>();
    __syncwarp();
    ring.Load(p, item + kPrefetch * num_workers, num_items, (stage + kPrefetch) % kStages);
    stage = (stage + 1) % kStages;
  }

  ForEachZeroRow(p.plan, worker, num_workers, [&](int64_t row) {
    for (int64_t offset = 0; row >= 0 && offset < p.row_bytes; offset += p.tile_bytes) {
      int64_t left = p.row_bytes - offset;
      ptx::BulkStore(p.rows + row * p.row_bytes + offset,
                     tiles,
                     static_cast<uint32_t>(min(left, int64_t{p.tile_bytes})));
    }
  });
  ptx::BulkCommitGroup();
  ptx::BulkWaitAll();
#endif
}

// The same with 16-byte loads and stores of a warp, for any device.
__global__ void __launch_bounds__(kVectorThreads)
    DispatchVectorKernel(const __grid_constant__ DispatchParams p) {
  int lane = threadIdx.x % kWarpSize;
  int64_t num_workers = int64_t{gridDim.x} * (kVectorThreads / kWarpSize);
  int64_t worker = (int64_t{blockIdx.x} * kVectorThreads + threadIdx.x) / kWarpSize;
  int64_t num_items = p.plan.num_tokens * p.num_tiles;
  for (int64_t item = worker; item < num_items; item += num_workers) {
    Tile tile(p, item);
    if (!HasRow(p.plan, tile.token)) continue;
    const uint4* in = reinterpret_cast<const uint4*>(p.x + tile.token * p.row_bytes + tile.offset);
    uint4 values[kVectorsPerLane];
#pragma unroll
    for (int i = 0; i < kVectorsPerLane; ++i) {
      int index = i * kWarpSize + lane;
      if (index * kVecBytes < tile.bytes) values[i] = in[index];
    }
    for (int k = 0; k < p.plan.top_k; ++k) {
      int64_t row = p.plan.slots[tile.token * p.plan.top_k + k];
      if (row < 0) continue;
      uint4* out = reinterpret_cast<uint4*>(p.rows + row * p.row_bytes + tile.offset);
#pragma unroll
      for (int i = 0; i < kVectorsPerLane; ++i) {
        int index = i * kWarpSize + lane;
        if (index * kVecBytes < tile.bytes) out[index] = values[i];
      }
    }
  }
  ZeroRowsByWarp(p.plan, p.rows, p.row_bytes, worker, num_workers);
}

// Cuts the rows into tiles of equal size.
void SetTiles(int64_t max_tile_bytes, DispatchParams* params) {
  int64_t tiles = (params->row_bytes + max_tile_bytes - 1) / max_tile_bytes;
  int64_t vectors = params->row_bytes / kVecBytes;
  params->tile_bytes = static_cast<int>((vectors + tiles - 1) / tiles * kVecBytes);
  params->num_tiles =
      static_cast<int>((params->row_bytes + params->tile_bytes - 1) / params->tile_bytes);
}

}  // namespace

cudaError_t LoadDispatch() {
  cudaFuncAttributes attributes;
  if (cudaError_t status = cudaFuncGetAttributes(&attributes, DispatchVectorKernel);
      status != cudaSuccess) {
    return status;
  }
  LaunchLimits limits;
  if (cudaError_t status = GetLaunchLimits(1, false, &limits); status != cudaSuccess) return status;
  if (!limits.has_bulk_copy) return cudaSuccess;
  return cudaFuncSetAttribute(DispatchBulkKernel,
                              cudaFuncAttributeMaxDynamicSharedMemorySize,
                              (kBulkWarps * kStages + 1) * kMaxTileBytes);
}

cudaError_t LaunchDispatch(const RowsPlan& plan,
                           const LaunchLimits& limits,
                           const void* x,
                           void* rows,
                           int64_t row_bytes,
                           cudaStream_t stream) {
  DispatchParams params{
      plan, static_cast<const char*>(x), static_cast<char*>(rows), row_bytes, 0, 0};
  if (limits.has_bulk_copy) {
    SetTiles(kMaxTileBytes, &params);
    int shared_bytes = (kBulkWarps * kStages + 1) * params.tile_bytes;
    DispatchBulkKernel<<<limits.num_sms, kBulkWarps * kWarpSize, shared_bytes, stream>>>(params);
  } else {
    SetTiles(kVectorsPerLane * kWarpSize * kVecBytes, &params);
    DispatchVectorKernel<<<limits.num_sms * kVectorBlocksPerSm, kVectorThreads, 0, stream>>>(
        params);
  }
  return cudaGetLastError();
}

}  // namespace jax_moe_ep
