#include <algorithm>

#include "dispatch.h"
#include "dispatch_bulk.cuh"

namespace jax_moe_ep {
namespace {

constexpr int kVectorThreads = 256;
constexpr int kVectorsPerLane = 4;  // loads in flight
constexpr int kVectorBlocksPerSm = 8;
constexpr int kGroupVectorThreads = 1024;  // of one block an SM: others stay free
constexpr int64_t kLead = 256;             // own tokens before the first of a peer

// One tile with 16-byte loads and stores of a warp.
template <bool kInGroup>
__device__ void MoveTile(const DispatchParams& p,
                         WarpItems<kInGroup>& items,
                         const Tile<kInGroup>& tile) {
  if (!tile.HasRow(p) || !items.IsReady(p, tile.source)) return;
  int lane = threadIdx.x % kWarpSize;
  const uint4* in = reinterpret_cast<const uint4*>(tile.Data(p, items.epoch));
  uint4 values[kVectorsPerLane];
#pragma unroll
  for (int i = 0; i < kVectorsPerLane; ++i) {
    int index = i * kWarpSize + lane;
    if (index * kVecBytes < tile.bytes) values[i] = in[index];
  }
  for (int k = 0; k < p.plan.top_k; ++k) {
    int64_t row = tile.Slots(p)[k];
    if (row < 0) continue;
    uint4* out = reinterpret_cast<uint4*>(p.rows + row * p.row_bytes + tile.offset);
#pragma unroll
    for (int i = 0; i < kVectorsPerLane; ++i) {
      int index = i * kWarpSize + lane;
      if (index * kVecBytes < tile.bytes) out[index] = values[i];
    }
  }
}

// The same for any device. Launch: any number of blocks of whole warps.
template <bool kInGroup>
__global__ void __launch_bounds__(kInGroup ? kGroupVectorThreads : kVectorThreads)
    DispatchVectorKernel(const __grid_constant__ DispatchParams p) {
  __shared__ BlockCall call;
  Begun begun{};
  int64_t num_workers = int64_t{gridDim.x} * (blockDim.x / kWarpSize);
  int64_t worker = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarpSize;
  WarpItems<kInGroup> items(p, worker, num_workers);
  if constexpr (kInGroup) {
    begun = Begin(p.group, p.num_chunks > 0, call);
  }
  uint64_t epoch = begun.epoch;
  if (epoch != kAborted) {
    if constexpr (kInGroup) {
      items.epoch = epoch;
      begun.num_told += StageX(p, epoch);
    }
    int64_t count = 0, num_items = NumItems<kInGroup>(p);
    for (int64_t item; (item = items.Next()) < num_items; ++count) {
      MoveTile(p, items, Tile<kInGroup>(p, item));
    }
    bool is_last = false;
    if constexpr (kInGroup) is_last = CompleteItems(p, epoch, count + begun.num_told);
    __syncwarp();
    ZeroRowsByWarp(p.plan, p.rows, p.row_bytes, worker, num_workers);
    if (is_last) Finish(p.group, epoch, p.group.is_read_in_place());
  }
  if constexpr (kInGroup) {
    End(p.group, [&] { PoisonByBlock(p.rows, p.plan.capacity * p.row_bytes); });
  }
}

DispatchParams Params(const RowsPlan& plan, const void* x, void* rows, int64_t row_bytes) {
  DispatchParams params{};
  params.plan = plan;
  params.x = static_cast<const char*>(x);
  params.rows = static_cast<char*>(rows);
  params.row_bytes = row_bytes;
  return params;
}

// Cuts the rows into tiles of equal size.
void SetTiles(int64_t max_tile_bytes, DispatchParams* params) {
  int64_t tiles = CeilDiv(params->row_bytes, max_tile_bytes);
  int64_t vectors = params->row_bytes / kVecBytes;
  params->tile_bytes = static_cast<int>(CeilDiv(vectors, tiles) * kVecBytes);
  params->num_tiles = static_cast<int>(CeilDiv(params->row_bytes, params->tile_bytes));
}

template <bool kInGroup>
int64_t NumStagedChunks(const DispatchParams& params, int64_t chunk_bytes) {
  if (!kInGroup || params.group.is_read_in_place()) return 0;
  return NumChunks(params.plan.num_tokens * params.row_bytes, chunk_bytes);
}

// Threads and blocks an SM of the vector path differ in a group.
template <bool kInGroup>
cudaError_t Launch(const LaunchLimits& limits, DispatchParams& params, cudaStream_t stream) {
  if (limits.has_bulk_copy) {
    SetTiles(kMaxTileBytes, &params);
    params.num_chunks = NumStagedChunks<kInGroup>(params, params.tile_bytes);
    int shared_bytes = (kMoveWarps * kStages + 1) * params.tile_bytes;
    DispatchBulkKernel<kInGroup>
        <<<limits.num_sms, kMoveWarps * kWarpSize, shared_bytes, stream>>>(params);
  } else {
    SetTiles(kVectorsPerLane * kWarpSize * kVecBytes, &params);
    params.num_chunks = NumStagedChunks<kInGroup>(params, kChunkBytes);
    int blocks = limits.num_sms * (kInGroup ? 1 : kVectorBlocksPerSm);
    DispatchVectorKernel<kInGroup>
        <<<blocks, kInGroup ? kGroupVectorThreads : kVectorThreads, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t LoadDispatch() {
  constexpr int64_t kSharedBytes = (kMoveWarps * kStages + 1) * kMaxTileBytes;
  static_assert(kSharedBytes < kBulkSharedBytes, "with room for what is static");
  cudaError_t status =
      LoadKernels(DispatchVectorKernel<false>, DispatchBulkKernel<false>, kSharedBytes);
  if (status != cudaSuccess) return status;
  return LoadKernels(DispatchVectorKernel<true>, DispatchBulkKernel<true>, kSharedBytes);
}

cudaError_t LaunchDispatch(const RowsPlan& plan,
                           const LaunchLimits& limits,
                           const void* x,
                           void* rows,
                           int64_t row_bytes,
                           cudaStream_t stream) {
  DispatchParams params = Params(plan, x, rows, row_bytes);
  return Launch<false>(limits, params, stream);
}

cudaError_t LaunchGroupDispatch(const GroupView& group,
                                const RegionLayout& layout,
                                const RowsPlan& plan,
                                const LaunchLimits& limits,
                                const void* x,
                                void* rows,
                                int64_t row_bytes,
                                cudaStream_t stream) {
  DispatchParams params = Params(plan, x, rows, row_bytes);
  params.group = group;
  params.order = {plan.num_tokens, std::min(plan.num_tokens, kLead)};
  params.staging_offset = layout.staging;
  return Launch<true>(limits, params, stream);
}

}  // namespace jax_moe_ep
