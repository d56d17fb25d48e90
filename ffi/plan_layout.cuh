// plan: what each expert may keep, and where its group lies.

#ifndef JAX_MOE_EP_PLAN_LAYOUT_CUH_
#define JAX_MOE_EP_PLAN_LAYOUT_CUH_

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "plan_params.cuh"

namespace jax_moe_ep {
namespace {

__device__ int32_t AlignedRows(const PlanOptions& options, int32_t rows) {
  if (options.block_for_empty) rows = max(rows, 1);
  return static_cast<int32_t>((int64_t{rows} + options.alignment - 1) / options.alignment *
                              options.alignment);
}

// One block lays out the L experts of one rank, expert i * kLayoutThreads + threadIdx.x in item i.
struct LayoutBlock {
  using Reduce = cub::BlockReduce<int32_t, kLayoutThreads>;
  using Scan = cub::BlockScan<int32_t, kLayoutThreads>;
  union Storage {
    Reduce::TempStorage reduce;
    Scan::TempStorage scan;
    int32_t result;
  };
  const PlanOptions& options;
  int num_local;
  Storage& storage;

  __device__ int Expert(int item) const { return item * kLayoutThreads + threadIdx.x; }

  // The sum over all experts of value(item), to all threads.
  template <typename Value>
  __device__ int32_t Sum(Value value) {
    int32_t mine = 0;
    for (int i = 0; i < kExpertsPerThread; ++i) {
      if (Expert(i) < num_local) mine += value(i);
    }
    int32_t sum = Reduce(storage.reduce).Sum(mine);
    __syncthreads();
    if (threadIdx.x == 0) storage.result = sum;
    __syncthreads();
    sum = storage.result;
    __syncthreads();
    return sum;
  }

  // The largest m with sum of AlignedRows(min(wanted, m)) <= C: INT32_MAX when all fits.
  __device__ int32_t LargestCap(const int32_t (&wanted)[kExpertsPerThread]) {
    auto rows = [&](int32_t m) {
      return Sum([&](int i) { return AlignedRows(options, min(wanted[i], m)); });
    };
    if (rows(INT32_MAX) <= options.capacity) return INT32_MAX;
    // It overflows, so some expert has more than m rows, and these m rows fit in C: m <= C.
    int32_t m = 0;
    for (int bit = 31 - __clz(max(options.capacity, 1)); bit >= 0; --bit) {
      if (rows(m + (1 << bit)) <= options.capacity) m += 1 << bit;
    }
    return m;
  }
};

// Caps of all experts; group arrays and totals of this rank. By priority, also what an expert
// that does not overflow selects (everything), and an empty histogram for the others.
// Launch: R blocks of kLayoutThreads.
__global__ void __launch_bounds__(kLayoutThreads)
    LayoutKernel(const __grid_constant__ PlanParams p) {
  __shared__ LayoutBlock::Storage storage;
  int num_local = p.shape.num_experts / p.shape.num_ranks;
  LayoutBlock block{p.options, num_local, storage};
  int first_expert = blockIdx.x * num_local;

  int32_t demand[kExpertsPerThread], wanted[kExpertsPerThread];
  for (int i = 0; i < kExpertsPerThread; ++i) {
    demand[i] = block.Expert(i) < num_local ? p.totals[first_expert + block.Expert(i)] : 0;
    wanted[i] = min(demand[i], p.options.expert_limit);
  }
  int32_t cap = min(block.LargestCap(wanted), p.options.expert_limit);
  for (int i = 0; i < kExpertsPerThread; ++i) {
    if (block.Expert(i) >= num_local) continue;
    int expert = first_expert + block.Expert(i);
    p.caps[expert] = cap;
    if (!p.shape.by_priority) continue;
    bool overflows = demand[i] > cap;
    p.thresholds[expert] = overflows && cap == 0 ? 0xffffffffu : 0;  // no key is that high
    p.quotas[expert] = overflows ? cap : INT32_MAX;
    for (int digit = 0; overflows && digit < kDigits; ++digit) {
      p.digits[expert * kDigits + digit] = 0;
    }
  }
  if (blockIdx.x != *p.arrays.rank) return;

  int32_t running = 0;
  for (int i = 0; i < kExpertsPerThread; ++i) {
    bool is_local = block.Expert(i) < num_local;
    int32_t live = min(demand[i], cap);
    int32_t size = is_local ? AlignedRows(p.options, live) : 0, start, total;
    LayoutBlock::Scan(storage.scan).ExclusiveSum(size, start, total);
    __syncthreads();
    if (is_local) {
      p.arrays.group_counts[block.Expert(i)] = live;
      p.arrays.group_sizes[block.Expert(i)] = size;
      p.arrays.group_starts[block.Expert(i)] = running + start;
    }
    running += total;
  }
  int32_t assignments = block.Sum([&](int i) { return demand[i]; });
  int32_t dropped = block.Sum([&](int i) { return demand[i] - min(demand[i], cap); });
  int32_t required = block.Sum([&](int i) { return AlignedRows(p.options, demand[i]); });
  if (threadIdx.x == 0) {
    *p.arrays.num_assignments = assignments;
    *p.arrays.num_dropped = dropped;
    *p.arrays.required_rows = required;
  }
}

}  // namespace
}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_PLAN_LAYOUT_CUH_
