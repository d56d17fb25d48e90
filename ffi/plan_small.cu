#include "plan.h"
#include "plan_small.cuh"

namespace jax_moe_ep {
namespace {

// Launch: one block of kSmallThreads. Inputs and results are those of plan.cu, and so is the
// example.
__global__ void __launch_bounds__(kSmallThreads)
    SmallPlanKernel(const __grid_constant__ PlanParams p) {
  __shared__ SmallPlanMemory memory;
  SmallItems items(p);
  items.Load(p, 0);
  memory.ZeroCounters(p);
  __syncthreads();
  PlanByBlock(p, memory, items, [] {});
}

}  // namespace

bool IsSmallPlan(const PlanShape& shape) {
  int64_t most = int64_t{WarpsPerRank(shape)} * kSmallRounds * kWarpSize;
  return !shape.by_priority && shape.num_experts <= kSmallExperts &&
         shape.assignments_per_rank <= most;
}

cudaError_t LoadSmallPlan() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, SmallPlanKernel);
}

cudaError_t LaunchSmallPlan(const PlanShape& shape,
                            const PlanOptions& options,
                            const PlanArrays& arrays,
                            cudaStream_t stream) {
  PlanParams params = SmallPlanParams(shape, options, arrays);
  SmallPlanKernel<<<1, kSmallThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace jax_moe_ep
