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

// Every rank's ids in its part of this rank's memory: pushes this rank's, and waits for the others.
// Null when a rank gave up; the same in all threads.
template <typename Unit>
__device__ const int32_t* MeetByBlock(const GatherParams<Unit>& p,
                                      uint64_t epoch,
                                      const Chunk<Unit>& first) {
  const GroupView& group = p.group;
  PushByBlock(
      p, epoch, first, [&](int64_t) { return PartOf(p, group.rank, group.rank, 0, epoch); });
  int warp = threadIdx.x / kWarpSize;
  bool is_there = warp >= group.num_ranks || WarpReady{}.Wait(group, epoch, warp);
  if (!__syncthreads_and(is_there)) return nullptr;
  return reinterpret_cast<const int32_t*>(PartOf(p, group.rank, 0, 0, epoch));
}

// The exchange of ids and this rank's plan, by one block. Inputs: ids of this rank; writes all
// arrays of the plan. Launch: one block of kSmallThreads. The steps are those of protocol.cuh; the
// ids stay in the parts of this rank's region, and the peers are told once all are in registers.
// When a rank gave up the plan is that of no ids, which all_ids holds then. The same bits on every
// run.
//
// The examples are those of gather_group.cu and plan.cu, one after the other.
template <typename Unit>
__global__ void __launch_bounds__(kSmallThreads)
    GroupSmallPlanKernel(const __grid_constant__ GroupPlanParams<Unit> p) {
  __shared__ SmallPlanMemory memory;
  __shared__ uint64_t epoch;
  const GroupView& group = p.gather.group;
  Chunk<Unit> first = FirstChunk(p.gather);
  memory.ZeroCounters(p.plan);
  if (threadIdx.x == 0) epoch = Begin(group, true, nullptr);
  __syncthreads();
  const int32_t* ids = epoch == kAborted ? nullptr : MeetByBlock(p.gather, epoch, first);
  PlanParams plan = p.plan;
  if (ids == nullptr) {
    PoisonGathered(p.gather);
    __syncthreads();
  } else {
    plan.arrays.ids = ids;
  }
  PlanByBlock(plan, memory, [&] {
    if (ids == nullptr) return;
    TellConsumed(group, epoch);
    Finish(group, epoch, false);
  });
  End(group, [] {});
}

}  // namespace

cudaError_t LoadGroupPlan() {
  cudaError_t status = ForEachUnit([](auto unit) {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, GroupSmallPlanKernel<decltype(unit)>);
  });
  if (status != cudaSuccess) return status;
  if (status = LoadPlan(); status != cudaSuccess) return status;
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
