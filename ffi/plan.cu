#include <cub/warp/warp_scan.cuh>

#include "plan.h"
#include "plan_layout.cuh"
#include "plan_place.cuh"
#include "plan_select.cuh"

// plan is a stable counting sort. Assignments are cut into chunks, none across two source ranks.
//
//   Count   how many assignments of each chunk fall into each bin
//   Scan    for each bin, how many there are in the chunks before
//   Layout  demand of each expert -> what it may keep, group sizes and starts
//   Place   each assignment's place among those of its expert -> slots, owners, source counts
//
// By position a bin is an expert, and an assignment stays when its place is below the expert's cap.
// By priority, Layout is followed by a radix select of each overflowing expert's cap-th highest
// key (SelectCount and SelectPick for each of four digits). Then Count and Scan run again with two
// bins an expert, (above the threshold, equal to it): all above stay, and the first `quota` equals.
//
// Every count is an integer sum and every place follows from the order of assignments, so the
// result does not depend on the order in which blocks run. No kernel waits for another block.
// Small plans by position take the same steps in one block: plan_small.cu.
//
// Example (E = 2, R = 1, A = 2, by position): ids 1 0 1 -1 give demand (1, 2), group_sizes (2, 2),
// group_starts (0, 2), slots 2 0 3 -1 and owners 0 0 0 -1.

namespace jax_moe_ep {
namespace {

// chunk_counts[chunk][bin] = assignments of the chunk in the bin.
// Launch: any number of blocks of grid.warps warps, num_bins counters of shared memory.
template <bool kSelected>
__global__ void CountKernel(const __grid_constant__ PlanParams p) {
  extern __shared__ int32_t counters[];
  int bins = kSelected ? 2 * p.shape.num_experts : p.shape.num_experts;
  for (int chunk = blockIdx.x; chunk < p.grid.num_chunks; chunk += gridDim.x) {
    FillZero(counters, bins);
    __syncthreads();
    WarpRange range(p, chunk, threadIdx.x / kWarpSize);
    for (int64_t i = range.begin + threadIdx.x % kWarpSize; i < range.end; i += kWarpSize) {
      int bin = BinOf<kSelected>(LoadItem<kSelected>(p, i));
      if (bin >= 0) atomicAdd(&counters[bin], 1);
    }
    __syncthreads();
    for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) {
      p.chunk_counts[int64_t{chunk} * bins + bin] = counters[bin];
    }
    __syncthreads();
  }
}

// chunk_counts[chunk][bin] -> the bin's count in the chunks before; totals[bin] = in all.
// Launch: ceil(bins / 32) blocks of 32 x 32: a lane a bin, a warp a run of chunks.
__global__ void ScanKernel(const __grid_constant__ PlanParams p, int bins) {
  __shared__ int32_t sums[kWarpSize][kWarpSize + 1];
  int lane = threadIdx.x, warp = threadIdx.y;
  int bin = blockIdx.x * kWarpSize + lane;
  int run = (p.grid.num_chunks + kWarpSize - 1) / kWarpSize;
  int begin = min(warp * run, p.grid.num_chunks), end = min(begin + run, p.grid.num_chunks);

  int32_t sum = 0;
  if (bin < bins) {
    for (int chunk = begin; chunk < end; ++chunk) {
      sum += p.chunk_counts[int64_t{chunk} * bins + bin];
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();

  // Transposed: warp w scans the runs of bin w.
  __shared__ typename cub::WarpScan<int32_t>::TempStorage storage[kWarpSize];
  int32_t before, total;
  cub::WarpScan<int32_t>(storage[warp]).ExclusiveSum(sums[lane][warp], before, total);
  if (lane == 0 && blockIdx.x * kWarpSize + warp < bins) {
    p.totals[blockIdx.x * kWarpSize + warp] = total;
  }
  sums[lane][warp] = before;
  __syncthreads();

  int32_t running = sums[warp][lane];
  if (bin >= bins) return;
  for (int chunk = begin; chunk < end; ++chunk) {
    int32_t& count = p.chunk_counts[int64_t{chunk} * bins + bin];
    int32_t here = count;
    count = running;
    running += here;
  }
}

// slots, owners, source_counts. Before: Scan of the same bins, Layout, and by priority the select.
// Launch: any number of blocks of grid.warps warps, warps * bins counters of shared memory.
template <bool kSelected>
__global__ void PlaceKernel(const __grid_constant__ PlanParams p) {
  extern __shared__ int32_t counters[];  // [warps, bins]
  int bins = p.grid.num_bins;
  int warp = threadIdx.x / kWarpSize;
  for (int chunk = blockIdx.x; chunk < p.grid.num_chunks; chunk += gridDim.x) {
    FillZero(counters, bins * p.grid.warps);
    __syncthreads();

    // Counts of each warp, then for each bin what comes before each warp.
    WarpRange range(p, chunk, warp);
    for (int64_t i = range.begin + threadIdx.x % kWarpSize; i < range.end; i += kWarpSize) {
      int bin = BinOf<kSelected>(LoadItem<kSelected>(p, i));
      if (bin >= 0) atomicAdd(&counters[warp * bins + bin], 1);
    }
    __syncthreads();
    const int32_t* before = p.chunk_counts + int64_t{chunk} * bins;
    for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) {
      int32_t running = before[bin];
      for (int w = 0; w < p.grid.warps; ++w) {
        int32_t here = counters[w * bins + bin];
        counters[w * bins + bin] = running;
        running += here;
      }
    }
    __syncthreads();
    PlaceWarp<kSelected>(p, range, counters + warp * bins);

    // The first chunk of a source rank writes that rank's counts.
    if (chunk % p.grid.chunks_per_rank == 0) {
      int source = chunk / p.grid.chunks_per_rank;
      const int32_t* after = source + 1 == p.shape.num_ranks
                                 ? p.totals
                                 : before + int64_t{p.grid.chunks_per_rank} * bins;
      WriteSourceCounts<kSelected>(p, source, before, after);
    }
    __syncthreads();
  }
}

template <bool kSelected>
void LaunchCountAndScan(const PlanParams& params, cudaStream_t stream) {
  int bins = params.shape.num_experts * (kSelected ? 2 : 1);
  CountKernel<kSelected><<<Blocks(params, params.grid.num_chunks),
                           params.grid.warps * kWarpSize,
                           bins * sizeof(int32_t),
                           stream>>>(params);
  ScanKernel<<<CeilDiv(bins, kWarpSize), dim3(kWarpSize, kWarpSize), 0, stream>>>(params, bins);
}

template <bool kSelected>
void LaunchPlace(const PlanParams& params, cudaStream_t stream) {
  size_t shared_bytes = params.grid.num_bins * params.grid.warps * sizeof(int32_t);
  PlaceKernel<kSelected><<<Blocks(params, params.grid.num_chunks),
                           params.grid.warps * kWarpSize,
                           shared_bytes,
                           stream>>>(params);
}

}  // namespace

int64_t PlanScratchSize(const PlanShape& shape) {
  PlanParams params{shape, {}, PlanGrid::OfBlocks(shape), {}};
  return CarveScratch(nullptr, params);
}

cudaError_t LoadPlan() {
  const void* kernels[] = {
      reinterpret_cast<const void*>(CountKernel<false>),
      reinterpret_cast<const void*>(CountKernel<true>),
      reinterpret_cast<const void*>(ScanKernel),
      reinterpret_cast<const void*>(LayoutKernel),
      reinterpret_cast<const void*>(SelectCountKernel),
      reinterpret_cast<const void*>(SelectPickKernel),
      reinterpret_cast<const void*>(PlaceKernel<false>),
      reinterpret_cast<const void*>(PlaceKernel<true>),
  };
  for (const void* kernel : kernels) {
    cudaFuncAttributes attributes;
    if (cudaError_t status = cudaFuncGetAttributes(&attributes, kernel); status != cudaSuccess) {
      return status;
    }
  }
  return LoadSmallPlan();
}

cudaError_t LaunchPlan(const PlanShape& shape,
                       const PlanOptions& options,
                       const PlanArrays& arrays,
                       cudaStream_t stream) {
  if (IsSmallPlan(shape) && !options.force_large) {
    return LaunchSmallPlan(shape, options, arrays, stream);
  }
  PlanParams params{shape, options, PlanGrid::OfBlocks(shape), arrays};
  CarveScratch(arrays.scratch, params);
  LaunchCountAndScan<false>(params, stream);
  LayoutKernel<<<shape.num_ranks, kLayoutThreads, 0, stream>>>(params);
  if (shape.by_priority) {
    LaunchSelect(params, stream);
    LaunchCountAndScan<true>(params, stream);
    LaunchPlace<true>(params, stream);
  } else {
    LaunchPlace<false>(params, stream);
  }
  return cudaGetLastError();
}

}  // namespace jax_moe_ep
