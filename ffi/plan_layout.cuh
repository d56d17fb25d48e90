// plan: a block lays out the experts of one rank.

#ifndef JAX_MOE_EP_PLAN_LAYOUT_CUH_
#define JAX_MOE_EP_PLAN_LAYOUT_CUH_

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "plan_groups.cuh"

namespace jax_moe_ep {
namespace {

// A team for LayoutRank: expert i * kLayoutThreads + threadIdx.x in item i.
struct LayoutBlock {
  using Reduce = cub::BlockReduce<int32_t, kLayoutThreads>;
  using Scan = cub::BlockScan<int32_t, kLayoutThreads>;
  union Storage {
    Reduce::TempStorage reduce;
    Scan::TempStorage scan;
    int32_t result;
  };
  Storage& storage;
  int num_local;
  int32_t demand[kExpertsPerThread];

  // totals: of the rank's experts.
  __device__ LayoutBlock(Storage& storage, const int32_t* totals, int num_local)
      : storage(storage), num_local(num_local) {
    for (int i = 0; i < kExpertsPerThread; ++i) demand[i] = Expert(i) < 0 ? 0 : totals[Expert(i)];
  }

  __device__ static constexpr int num_items() { return kExpertsPerThread; }
  __device__ int Expert(int item) const {
    int expert = item * kLayoutThreads + threadIdx.x;
    return expert < num_local ? expert : -1;
  }
  __device__ int32_t Demand(int item) const { return demand[item]; }
  __device__ bool IsFirst() const { return threadIdx.x == 0; }

  template <typename Value>
  __device__ int32_t Sum(Value value) {
    int32_t mine = 0;
    for (int i = 0; i < kExpertsPerThread; ++i) {
      if (Expert(i) >= 0) mine += value(i);
    }
    int32_t sum = Reduce(storage.reduce).Sum(mine);
    __syncthreads();
    if (threadIdx.x == 0) storage.result = sum;
    __syncthreads();
    sum = storage.result;
    __syncthreads();
    return sum;
  }

  __device__ void ExclusiveSum(int32_t value, int32_t& start, int32_t& total) {
    Scan(storage.scan).ExclusiveSum(value, start, total);
    __syncthreads();
  }
};

// Launch: R blocks of kLayoutThreads, a rank each.
__global__ void __launch_bounds__(kLayoutThreads)
    LayoutKernel(const __grid_constant__ PlanParams p) {
  __shared__ LayoutBlock::Storage storage;
  int num_local = p.shape.num_experts / p.shape.num_ranks;
  LayoutBlock block(storage, p.totals + blockIdx.x * num_local, num_local);
  LayoutRank(p, block, blockIdx.x, [&](int32_t cap) { WriteTotals(p, block, cap); });
}

}  // namespace
}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_PLAN_LAYOUT_CUH_
