#include "plan_group.h"
#include "plan_small.cuh"
#include "protocol.cuh"

namespace jax_moe_ep {
namespace {

// Few ids cross a word each, the expert with a tag of the call above it: who reads one needs no
// flag, nor a fence before it. A word holds the tag of its call alone, as every call has another:
// those of a signature count on from where its hash says, modulo 2^53.
constexpr int kExpertBits = 11;
constexpr uint64_t kExpertMask = (uint64_t{1} << kExpertBits) - 1;
static_assert(kSmallExperts <= kExpertMask, "an expert + 1, or 0 for none");
static_assert(kSmallWarps * kSmallRounds * kWarpSize <= kMaxFewIds);

// What the tag of a call is made of, all bits of all of it.
inline uint64_t Hash(const CallSignature& signature) {
  uint64_t hash = 0;
  for (uint64_t word : {static_cast<uint64_t>(signature.op),
                        static_cast<uint64_t>(signature.top_k),
                        static_cast<uint64_t>(signature.num_tokens),
                        static_cast<uint64_t>(signature.row_bytes),
                        signature.options}) {
    hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 32;
  }
  return hash;
}

struct GroupPlanParams {
  GroupView group;
  uint64_t hash;    // of the signature
  PlanParams plan;  // with ids of this rank alone

  __device__ uint64_t Tag(uint64_t epoch) const { return (hash + epoch) << kExpertBits; }
};

// Writes the warp's items, this rank's, to all peers.
__device__ void Send(const GroupPlanParams& p, uint64_t epoch, const SmallItems& items) {
#pragma unroll 1
  for (int offset = 1; offset < p.group.num_ranks; ++offset) {
    uint64_t* there = p.group.controls[Peer(p.group, offset)]->few_ids[epoch & 1];
#pragma unroll
    for (int i = 0; i < kSmallRounds; ++i) {
      if (items.Index(i) >= items.range.end) continue;
      StoreRelaxedSystem(&there[items.Index(i)], p.Tag(epoch) | (items.experts[i] + 1));
    }
  }
}

// Reads the warp's items, a peer's. False when some are not there yet; the same in all lanes.
__device__ bool Read(const GroupPlanParams& p, uint64_t epoch, SmallItems& items) {
  const uint64_t* here = OwnControl(p.group)->few_ids[epoch & 1];
  uint64_t words[kSmallRounds];
#pragma unroll
  for (int i = 0; i < kSmallRounds; ++i) {  // all loads are under way before the first is looked at
    words[i] = p.Tag(epoch);
    if (items.Index(i) < items.range.end) words[i] = LoadRelaxedSystem(&here[items.Index(i)]);
  }
  bool is_there = true;
#pragma unroll
  for (int i = 0; i < kSmallRounds; ++i) {
    items.experts[i] = static_cast<int>(words[i] & kExpertMask) - 1;
    is_there &= (words[i] & ~kExpertMask) == p.Tag(epoch);
  }
  return !__any_sync(kAllLanes, !is_there);
}

// Until the warp's items, a peer's, have come. False when a rank gave up, or the peer is in another
// call; the same in all lanes.
__device__ bool Receive(const GroupPlanParams& p, uint64_t epoch, SmallItems& items) {
  constexpr int kLooks = 64;  // some 40 us: then nothing is lost by waiting for the flag
  for (int look = 0; look < kLooks; ++look) {
    if (Read(p, epoch, items)) return true;
  }
  return WarpReady{}.Wait(p.group, epoch, SmallItems::Source(p.plan)) && Read(p, epoch, items);
}

// A block's items of all ranks: the warps of this one's send, and the others receive. False when a
// rank gave up; the same in all threads.
__device__ bool Exchange(const GroupPlanParams& p, uint64_t epoch, SmallItems& items) {
  int source = SmallItems::Source(p.plan);
  bool is_there = true;
  if (source == p.group.rank) {
    Send(p, epoch, items);
    int num_warps = p.plan.grid.warps;
    ptx::NamedBarrier(1, num_warps * kWarpSize);
    bool is_first = threadIdx.x == source * num_warps * kWarpSize;
    if (is_first) Publish(p.group, epoch);
  } else if (source < p.group.num_ranks) {
    is_there = Receive(p, epoch, items);
  }
  return __syncthreads_and(is_there);
}

// The exchange of ids and this rank's plan, by one block. Inputs: ids of this rank; writes all
// arrays of the plan. Launch: one block of kSmallThreads. The steps are those of protocol.cuh; the
// peers are told once all ids are in registers. When a rank gave up the plan is that of no ids. The
// same bits on every run.
//
// Example (R = 2, K = 2, E = 4): ids (0 2) on rank 0 and (2 3) on rank 1 make each rank's plan that
// of plan.cu for ids (0 2) (2 3).
__global__ void __launch_bounds__(kSmallThreads)
    GroupSmallPlanKernel(const __grid_constant__ GroupPlanParams p) {
  __shared__ SmallPlanMemory memory;
  __shared__ uint64_t epoch;
  const GroupView& group = p.group;
  SmallItems items(p.plan);
  if (SmallItems::Source(p.plan) == group.rank) items.Load(p.plan, p.plan.first_own());
  memory.ZeroCounters(p.plan);
  if (threadIdx.x == 0) epoch = Begin(group, true);
  __syncthreads();
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
    GroupPlanParams params{group, Hash(group.signature), SmallPlanParams(shape, options, arrays)};
    params.plan.arrays.ids = static_cast<const int32_t*>(gathered.x[0]);
    GroupSmallPlanKernel<<<1, kSmallThreads, 0, stream>>>(params);
    return cudaGetLastError();
  }
  cudaError_t status = LaunchGroupGather(group, layout, gathered, options.num_sms, stream);
  return status == cudaSuccess ? LaunchPlan(shape, options, arrays, stream) : status;
}

}  // namespace jax_moe_ep
