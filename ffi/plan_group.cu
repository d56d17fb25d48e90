#include "gather_group.cuh"
#include "plan_group.h"
#include "plan_small.cuh"

namespace jax_moe_ep {
namespace {

template <typename Unit>
struct GroupPlanParams {
  GatherParams<Unit> gather;  // of ids
  PlanParams plan;
};

// The ids of all ranks and this rank's plan, by one block. Inputs: ids of this rank; writes all ids
// and all arrays of the plan. Launch: one block of kSmallThreads. The steps are those of
// protocol.cuh; the peers are told that their ids are consumed while the experts are laid out. When
// a rank gave up the plan is that of no ids. The same bits on every run.
//
// The examples are those of gather_group.cu and plan.cu, one after the other.
template <typename Unit>
__global__ void __launch_bounds__(kSmallThreads)
    GroupSmallPlanKernel(const __grid_constant__ GroupPlanParams<Unit> p) {
  const GroupView& group = p.gather.group;
  __shared__ uint64_t epoch;
  if (threadIdx.x == 0) epoch = Begin(group, true, nullptr);
  __syncthreads();
  bool is_done = epoch != kAborted && GatherByBlock(p.gather, epoch);
  if (!is_done) PoisonGathered(p.gather);
  __syncthreads();
  PlanByBlock(p.plan, [&] {
    if (!is_done) return;
    TellConsumed(group, epoch);
    Finish(group, epoch, false);
  });
  End(group, [] {});
}

template <typename Unit>
cudaError_t Load() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, GroupSmallPlanKernel<Unit>);
}

}  // namespace

cudaError_t LoadGroupPlan() {
  if (cudaError_t status = Load<uint4>(); status != cudaSuccess) return status;
  if (cudaError_t status = Load<uint32_t>(); status != cudaSuccess) return status;
  if (cudaError_t status = Load<uint8_t>(); status != cudaSuccess) return status;
  if (cudaError_t status = LoadPlan(); status != cudaSuccess) return status;
  return LoadGroupGather();
}

cudaError_t LaunchGroupPlan(const GroupView& group,
                            const RegionLayout& layout,
                            const GatherArrays& gathered,
                            const PlanShape& shape,
                            const PlanOptions& options,
                            const PlanArrays& arrays,
                            cudaStream_t stream) {
  if (IsSmallPlan(shape) && !options.force_large) {
    return WithUnit(gathered, [&](auto unit) {
      using Unit = decltype(unit);
      GroupPlanParams<Unit> params{MakeGatherParams<Unit>(group, layout, gathered),
                                   SmallPlanParams(shape, options, arrays)};
      GroupSmallPlanKernel<Unit><<<1, kSmallThreads, 0, stream>>>(params);
      return cudaGetLastError();
    });
  }
  cudaError_t status = LaunchGroupGather(group, layout, gathered, options.num_sms, stream);
  return status == cudaSuccess ? LaunchPlan(shape, options, arrays, stream) : status;
}

}  // namespace jax_moe_ep
