#include "plan_group.h"
#include "plan_small.cuh"
#include "protocol.cuh"

namespace jax_moe_ep {
namespace {

// Few ids cross a word each: the expert + 1, or 0 for none.
using IdWords = TaggedWords<11>;
static_assert(kSmallExperts <= IdWords::kMask);
static_assert(kSmallWarps * kSmallRounds * kWarpSize <= kMaxFewWords);

struct GroupPlanParams {
  GroupView group;
  PlanParams plan;  // with ids of this rank alone
};

// Writes the warp's items, this rank's, to all peers.
__device__ void Send(const GroupPlanParams& p, uint64_t epoch, const SmallItems& items) {
  IdWords words(p.group, epoch);
#pragma unroll 1
  for (int offset = 1; offset < p.group.num_ranks; ++offset) {
    uint64_t* there = p.group.controls[Peer(p.group, offset)]->few_words[epoch & 1];
#pragma unroll
    for (int i = 0; i < kSmallRounds; ++i) {
      if (items.Index(i) >= items.range.end) continue;
      StoreRelaxedSystem(&there[items.Index(i)], words.Make(items.experts[i] + 1));
    }
  }
}

// Reads the warp's items, a peer's. False when some are not there yet; the same in all lanes.
__device__ bool Read(const GroupPlanParams& p, uint64_t epoch, SmallItems& items) {
  const uint64_t* here = OwnControl(p.group)->few_words[epoch & 1];
  IdWords words(p.group, epoch);
  uint64_t found[kSmallRounds];
#pragma unroll
  for (int i = 0; i < kSmallRounds; ++i) {  // all loads are under way before the first is looked at
    found[i] = words.Make(0);
    if (items.Index(i) < items.range.end) found[i] = LoadRelaxedSystem(&here[items.Index(i)]);
  }
  bool is_there = true;
#pragma unroll
  for (int i = 0; i < kSmallRounds; ++i) {
    items.experts[i] = static_cast<int>(IdWords::Number(found[i])) - 1;
    is_there &= words.Has(found[i]);
  }
  return !__any_sync(kAllLanes, !is_there);
}

// Until a lane's words have come, from the first at an index. False as WaitLongForWords.
static __device__ __noinline__ bool WaitLongForIds(
    const GroupPlanParams& p, uint64_t epoch, int source, int64_t index, int64_t end) {
  const uint64_t* first = &OwnControl(p.group)->few_words[epoch & 1][index];
  int count = static_cast<int>(CeilDiv(end - index, kWarpSize));
  AwaitedWords words = IdWords(p.group, epoch).At(first, count, kWarpSize);
  return WaitLongForWords(p.group, epoch, source, words);
}

// Until the warp's items, a peer's, have come. False when a rank gave up, or the peer is in another
// call; the same in all lanes.
__device__ bool Receive(const GroupPlanParams& p, uint64_t epoch, SmallItems& items) {
#pragma unroll 1
  for (int look = 0; look < kLooks; ++look) {
    if (Read(p, epoch, items)) return true;
  }
  int source = SmallItems::Source(p.plan);
  bool is_there = WaitLongForIds(p, epoch, source, items.Index(0), items.range.end);
  return !__any_sync(kAllLanes, !is_there) && Read(p, epoch, items);
}

// A block's items of all ranks: the warps of this one's send, and the others receive. False when a
// rank gave up; the same in all threads.
__device__ bool Exchange(const GroupPlanParams& p, uint64_t epoch, SmallItems& items) {
  int source = SmallItems::Source(p.plan);
  bool is_there = true;
  if (source == p.group.rank) {
    Send(p, epoch, items);
    if (SmallItems::Warp() == source * p.plan.grid.warps) SendSignature(p.group, epoch);
  } else if (source < p.group.num_ranks) {
    is_there = Receive(p, epoch, items);
  }
  return __syncthreads_and(is_there);
}

// The exchange of ids and this rank's plan, by one block. Inputs: ids of this rank; writes all
// arrays of the plan. Launch: one block of kSmallThreads. The steps are those of protocol.cuh, but
// that a barrier of the block stands for items. When a rank gave up the plan is that of no ids. The
// same bits on every run.
//
// Example (R = 2, K = 2, E = 4): ids (0 2) on rank 0 and (2 3) on rank 1 make each rank's plan that
// of plan.cu for ids (0 2) (2 3).
__global__ void __launch_bounds__(kSmallThreads)
    GroupSmallPlanKernel(const __grid_constant__ GroupPlanParams p) {
  __shared__ SmallPlanMemory memory;
  __shared__ BlockCall call;
  const GroupView& group = p.group;
  SmallItems items(p.plan);
  if (SmallItems::Source(p.plan) == group.rank) items.Load(p.plan, p.plan.first_own());
  memory.ZeroCounters(p.plan);
  uint64_t epoch = Begin(group, true, call).epoch;
  bool is_there = epoch != kAborted && Exchange(p, epoch, items);
  if (!is_there) items.Clear();
  PlanByBlock(p.plan, memory, items, [&] {
    if (!is_there) return;
    TellConsumed(group, epoch);
    Finish(group, epoch, false);
  });
  End(group, [] {});
}

}  // namespace

cudaError_t LoadGroupPlan() {
  cudaFuncAttributes attributes;
  cudaError_t status = cudaFuncGetAttributes(&attributes, GroupSmallPlanKernel);
  if (status != cudaSuccess) return status;
  // As the kernels that run before and after it: an SM is emptied to be divided otherwise.
  status = cudaFuncSetAttribute(GroupSmallPlanKernel,
                                cudaFuncAttributePreferredSharedMemoryCarveout,
                                cudaSharedmemCarveoutMaxShared);
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
    GroupPlanParams params{group, SmallPlanParams(shape, options, arrays)};
    params.plan.arrays.ids = static_cast<const int32_t*>(gathered.x[0]);
    GroupSmallPlanKernel<<<1, kSmallThreads, 0, stream>>>(params);
    return cudaGetLastError();
  }
  cudaError_t status = LaunchGroupGather(group, layout, gathered, options.num_sms, stream);
  return status == cudaSuccess ? LaunchPlan(shape, options, arrays, stream) : status;
}

}  // namespace jax_moe_ep
