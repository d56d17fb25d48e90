#include <algorithm>

#include "gather_group.cuh"

namespace jax_moe_ep {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kChunksPerWarp = 4;  // beyond them a second block helps more than its claims cost
constexpr int kMaxBlocks = 32;

template <typename Unit>
__device__ void GatherByClaims(const GatherParams<Unit>& p, uint64_t epoch) {
  Stage(p.group, epoch, nullptr, p.num_chunks(), [&](int64_t chunk) {
    Push(p, epoch, Chunk<Unit>::Loaded(p, chunk), OwnOut(p, chunk));
  });
  int64_t count = 0;
  for (int64_t item; (item = ClaimByWarp(p.group, &p.group.launch->claims)) < p.num_items();) {
    if (!Copy(p, epoch, item)) break;
    ++count;
  }
  __syncwarp();
  if (threadIdx.x % kWarpSize != 0) return;
  if (Complete(&p.group.launch->done, count, p.num_items())) {
    TellConsumed(p.group, epoch);
    Finish(p.group, epoch, false);
  }
}

// The same by one block alone. True for one thread, which must still tell the peers.
template <typename Unit>
__device__ bool GatherByBlock(const GatherParams<Unit>& p,
                              uint64_t epoch,
                              const Chunk<Unit>& first) {
  PushByBlock(p, epoch, first, [&](int64_t chunk) { return OwnOut(p, chunk); });
  bool is_done = true;
  for (int64_t item = threadIdx.x / kWarpSize; is_done && item < p.num_items(); item += kWarps) {
    is_done = Copy(p, epoch, item);
  }
  return __syncthreads_and(is_done) && threadIdx.x == 0;
}

// Inputs: x; writes all of out, and x into this rank's part of every peer's region. Launch: blocks
// of kThreads, any number of them, or one with kIsAlone. The steps are those of protocol.cuh: all
// chunks are pushed, then the peers are told; items are the chunks of the peers' parts, each copied
// out once its rank has told. Nothing reads XLA's memory of another rank, so nobody waits at the
// end. Data only moves: the same bits on every run.
//
// Example (R = 2): x = (1, 2) on rank 0 and (3, 4) on rank 1 give out = (1, 2, 3, 4) on both.
template <typename Unit, bool kIsAlone>
__global__ void __launch_bounds__(kThreads)
    GroupGatherKernel(const __grid_constant__ GatherParams<Unit> p) {
  __shared__ uint64_t epoch;
  Chunk<Unit> first = FirstChunk(p);
  if (threadIdx.x == 0) epoch = Begin(p.group, true, nullptr);
  __syncthreads();
  if (epoch != kAborted) {
    if constexpr (kIsAlone) {
      if (GatherByBlock(p, epoch, first)) {
        TellConsumed(p.group, epoch);
        Finish(p.group, epoch, false);
      }
    } else {
      GatherByClaims(p, epoch);
    }
  }
  End(p.group, [&] { PoisonGathered(p); });
}

template <typename Unit>
cudaError_t Load() {
  cudaFuncAttributes attributes;
  cudaError_t status = cudaFuncGetAttributes(&attributes, GroupGatherKernel<Unit, false>);
  if (status != cudaSuccess) return status;
  return cudaFuncGetAttributes(&attributes, GroupGatherKernel<Unit, true>);
}

}  // namespace

cudaError_t LoadGroupGather() {
  return ForEachUnit([](auto unit) { return Load<decltype(unit)>(); });
}

cudaError_t LaunchGroupGather(const GroupView& group,
                              const RegionLayout& layout,
                              const GatherArrays& arrays,
                              int max_blocks,
                              cudaStream_t stream) {
  if (arrays.bytes == 0) return cudaSuccess;
  return WithUnit(arrays, [&](auto unit) {
    using Unit = decltype(unit);
    GatherParams<Unit> params = MakeGatherParams<Unit>(group, layout, arrays);
    int64_t work = params.num_chunks() + params.num_items();
    int64_t wanted = work <= kWarps * kChunksPerWarp ? 1 : (work + kWarps - 1) / kWarps;
    int blocks = static_cast<int>(std::min<int64_t>({wanted, max_blocks, kMaxBlocks}));
    if (blocks == 1) {
      GroupGatherKernel<Unit, true><<<1, kThreads, 0, stream>>>(params);
    } else {
      GroupGatherKernel<Unit, false><<<blocks, kThreads, 0, stream>>>(params);
    }
    return cudaGetLastError();
  });
}

}  // namespace jax_moe_ep
