#include <algorithm>

#include "gather_group.h"
#include "protocol.cuh"
#include "warp_chunk.cuh"

namespace jax_moe_ep {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kChunksPerWarp = 4;  // beyond them a second block helps more than its claims cost
constexpr int kMaxBlocks = 32;

// A Unit is what one thread moves at once: the longest that divides sizes and addresses.
template <typename Unit>
struct GatherParams {
  GroupView group;
  int64_t gathered;          // where the parts of all ranks begin in a half of a region
  int64_t num_units;         // of one array of one rank
  int64_t chunks_per_array;  // of one rank
  int num_arrays;
  const Unit* x[kMaxGathered];  // [num_units]
  Unit* out[kMaxGathered];      // [R, num_units]

  __host__ __device__ int64_t num_chunks() const { return num_arrays * chunks_per_array; }
  __host__ __device__ int64_t num_items() const { return (group.num_ranks - 1) * num_chunks(); }
};

// Rank `source`'s array in rank `owner`'s memory.
template <typename Unit>
__device__ Unit* PartOf(
    const GatherParams<Unit>& p, int owner, int source, int array, uint64_t epoch) {
  char* parts = Half(p.group, owner, epoch) + p.gathered;
  int64_t part = int64_t{source} * p.num_arrays + array;
  return reinterpret_cast<Unit*>(parts) + part * p.num_units;
}

// Chunks are numbered through all arrays of a rank.
template <typename Unit>
struct Chunk : WarpChunk<Unit> {
  int array;

  __device__ Chunk(const GatherParams<Unit>& p, int64_t number)
      : WarpChunk<Unit>(number % p.chunks_per_array, p.num_units),
        array(static_cast<int>(number / p.chunks_per_array)) {}

  // Of this rank's numbers, if there is one with this number.
  __device__ static Chunk Loaded(const GatherParams<Unit>& p, int64_t number) {
    Chunk chunk(p, number);
    if (number < p.num_chunks()) chunk.Load(p.x[chunk.array]);
    return chunk;
  }
};

// A warp writes a chunk of this rank's numbers into its part of every peer's memory, and into
// `own`.
template <typename Unit>
__device__ void Push(const GatherParams<Unit>& p,
                     uint64_t epoch,
                     const Chunk<Unit>& piece,
                     Unit* own) {
  for (int offset = 1; offset < p.group.num_ranks; ++offset) {
    int peer = Peer(p.group, offset);
    piece.Store(PartOf(p, peer, p.group.rank, piece.array, epoch));
  }
  piece.Store(own);
}

// Where this rank's numbers go in the result.
template <typename Unit>
__device__ Unit* OwnOut(const GatherParams<Unit>& p, int64_t chunk) {
  return p.out[chunk / p.chunks_per_array] + p.group.rank * p.num_units;
}

// A warp copies a chunk of a peer's numbers out, once they are there. False when a rank gave up.
template <typename Unit>
__device__ bool Copy(const GatherParams<Unit>& p, uint64_t epoch, int64_t item) {
  int source = Peer(p.group, static_cast<int>(1 + item / p.num_chunks()));
  if (!WarpReady{}.Wait(p.group, epoch, source)) return false;
  Chunk<Unit> piece(p, item % p.num_chunks());
  piece.Load(PartOf(p, p.group.rank, source, piece.array, epoch));
  piece.Store(p.out[piece.array] + source * p.num_units);
  return true;
}

template <typename Unit>
__device__ void GatherByClaims(const GatherParams<Unit>& p, uint64_t epoch) {
  int64_t count = Stage(p.group, epoch, p.num_chunks(), [&](int64_t chunk) {
    Push(p, epoch, Chunk<Unit>::Loaded(p, chunk), OwnOut(p, chunk));
  });
  for (int64_t item; (item = ClaimByWarp(p.group, &p.group.launch->claims)) < p.num_items();) {
    if (!Copy(p, epoch, item)) break;
    ++count;
  }
  __syncwarp();
  if (threadIdx.x % kWarpSize != 0) return;
  if (Complete(&p.group.launch->done, count, p.num_items() + 1)) {
    TellConsumed(p.group, epoch);
    Finish(p.group, epoch, false);
  }
}

// The same by one block alone: its warps all run, so they share the work by number and claim
// nothing. piece: the warp's first. True for one thread, which must still tell the peers.
template <typename Unit>
__device__ bool GatherByBlock(const GatherParams<Unit>& p, uint64_t epoch, Chunk<Unit> piece) {
  int warp = threadIdx.x / kWarpSize;
  for (int64_t chunk = warp; chunk < p.num_chunks();) {
    Push(p, epoch, piece, OwnOut(p, chunk));
    chunk += kWarps;
    piece = Chunk<Unit>::Loaded(p, chunk);
  }
  __syncthreads();
  if (warp == 0) Publish(p.group, epoch);
  bool is_done = true;
  for (int64_t item = warp; is_done && item < p.num_items(); item += kWarps) {
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
  __shared__ BlockCall call;
  // What a warp of a block alone pushes first, loaded before the call begins.
  Chunk<Unit> first = Chunk<Unit>::Loaded(p, threadIdx.x / kWarpSize);
  uint64_t epoch = Begin(p.group, true, call).epoch;
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
  End(p.group, [&] {
    for (int array = 0; array < p.num_arrays; ++array) {
      PoisonByBlock(p.out[array], p.group.num_ranks * p.num_units * sizeof(Unit));
    }
  });
}

template <typename Unit>
GatherParams<Unit> MakeGatherParams(const GroupView& group,
                                    const RegionLayout& layout,
                                    const GatherArrays& arrays) {
  GatherParams<Unit> params{};
  params.group = group;
  params.gathered = layout.gathered;
  params.num_units = arrays.bytes / static_cast<int64_t>(sizeof(Unit));
  params.chunks_per_array = NumWarpChunks(params.num_units);
  params.num_arrays = arrays.count;
  for (int i = 0; i < arrays.count; ++i) {
    params.x[i] = static_cast<const Unit*>(arrays.x[i]);
    params.out[i] = static_cast<Unit*>(arrays.out[i]);
  }
  return params;
}

// Calls launch(Unit{}) with the longest unit that divides sizes and addresses.
template <typename Launch>
cudaError_t WithUnit(const GatherArrays& arrays, Launch launch) {
  uint64_t bits = arrays.bytes;
  for (int i = 0; i < arrays.count; ++i) {
    bits |= reinterpret_cast<uintptr_t>(arrays.x[i]) | reinterpret_cast<uintptr_t>(arrays.out[i]);
  }
  if (bits % sizeof(uint4) == 0) return launch(uint4{});
  if (bits % sizeof(uint32_t) == 0) return launch(uint32_t{});
  return launch(uint8_t{});
}

// Calls use(Unit{}) with each of them, until one fails.
template <typename Use>
cudaError_t ForEachUnit(Use use) {
  if (cudaError_t status = use(uint4{}); status != cudaSuccess) return status;
  if (cudaError_t status = use(uint32_t{}); status != cudaSuccess) return status;
  return use(uint8_t{});
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
    int64_t wanted = work <= kWarps * kChunksPerWarp ? 1 : CeilDiv(work, kWarps);
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
