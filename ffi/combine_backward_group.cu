#include <algorithm>

#include "combine.h"
#include "combine_backward_group_bulk.cuh"

namespace jax_moe_ep {
namespace {

constexpr int kTeams = 2;  // of one block an SM: the other SMs stay free
constexpr int kThreads = 256;
using BackwardTeam = Team<kThreads, kTeams>;
constexpr int64_t kLead = 256;  // own tokens before the first of a peer

// dy of the pull's rows here, dw of them into the tables of the token's rank. False when a rank
// gave up.
template <typename T>
__device__ bool DoPull(const GroupBackwardParams<T>& p,
                       const BackwardTeam& team,
                       TeamReady<BackwardTeam>& ready,
                       uint64_t epoch,
                       const Pull& pull,
                       float (*partial)[kWeightsAtOnce]) {
  int top_k = p.plan.top_k;
  const int32_t* slots = p.Slots(pull.source, pull.token);
  bool has = false;
  for (int k = 0; k < top_k; ++k) has |= slots[k] >= 0;
  if (!has) return true;
  if (!ready.Wait(p.group, team, epoch, pull.source)) return false;
  float* dweights = p.WeightGradients(pull, epoch);
  int64_t first = pull.first_byte / sizeof(T), end = pull.end_byte / sizeof(T);
  const T* dout = p.Gradients(pull.source, epoch) + pull.token * p.hidden;
  const float* weights = p.Weights(pull.source, pull.token, epoch);
  TokenGradients<T> gradients{
      dout + first, p.y + first, p.dy + first, p.hidden, end - first, slots, weights};
  for (int from = 0; from < top_k; from += kWeightsAtOnce) {
    int count = min(kWeightsAtOnce, top_k - from);
    gradients.ScaleAndDot(team, from, count, partial);
    float dot = SumOverWarps(team, partial);
    int k = from + team.thread;
    if (team.thread < count && slots[k] >= 0) dweights[k] = dot;
    team.Sync();
  }
  return true;
}

// A chunk of this rank's weight gradients, once all ranks have returned theirs. False when a rank
// gave up.
template <typename T>
__device__ bool Collect(const GroupBackwardParams<T>& p,
                        const BackwardTeam& team,
                        uint64_t epoch,
                        int64_t chunk) {
  bool is_there = true;
  if (team.thread < p.group.num_ranks) {
    const uint64_t* flag = &OwnControl(p.group)->returned[team.thread];
    is_there = WaitForFlag(p.group, flag, epoch, Phase::kReturned, team.thread);
  }
  if (!team.And(is_there)) return false;
  int64_t end = min((chunk + 1) * kWarpChunk, p.num_weights());
  for (int64_t i = chunk * kWarpChunk + team.thread; i < end; i += kThreads) {
    float gradient = 0;
    int64_t num_parts = p.owners[i] >= 0 ? p.parts.count : 0;
    for (int64_t part = 0; part < num_parts; ++part) {
      gradient += p.WeightGradients(p.group.rank, part, epoch)[i];
    }
    p.dweights[i] = gradient;
  }
  return true;
}

// Inputs: plan, owners, dout, y, weights; writes all of dweights, dy but for an undefined tail,
// weights and their gradients into the peers' tables. Launch: any number of blocks of
// kTeams * kThreads. The steps are those of protocol.cuh. Items are the pulls, then the chunks of
// dweights: these wait for the pulls of all ranks, which wait for no such chunk. dout is not
// written before all peers have read it.
//
// Example (R = 2, K = 2, H = 2): rank 0's dout = (1, 2), owners (1 -1), weights (3, NaN). Rank 1
// has y[1] = (4, 5) and slots (1 -1) for it: dy[1] = (3, 6) there, dweights = (14, 0) here.
template <typename T>
__global__ void __launch_bounds__(kTeams* kThreads, 1)
    GroupCombineBackwardKernel(const __grid_constant__ GroupBackwardParams<T> p) {
  __shared__ BlockCall call;
  __shared__ int64_t claims[kTeams];
  __shared__ float partial[kTeams][BackwardTeam::kWarps][kWeightsAtOnce];
  Begun begun = Begin(p.group, p.num_staged() > 0, call);
  uint64_t epoch = begun.epoch;
  if (epoch != kAborted) {
    int64_t num_done = begun.num_told + StageGradients(p, epoch);
    const BackwardTeam team;
    TeamItems<BackwardTeam> items(p.group, team, &claims[team.id]);
    TeamReady<BackwardTeam> ready;
    int64_t pulls = 0, chunks = 0, num_items = p.num_pulls() + p.num_weight_chunks();
    int64_t item = items.Next();
    bool goes_on = true;
    for (; goes_on && item < p.num_pulls(); item = items.Next(), ++pulls) {
      goes_on = DoPull(p, team, ready, epoch, p.PullAt(item), partial[team.id]);
    }
    team.Sync();
    if (goes_on && team.thread == 0) CompletePulls(p, epoch, pulls);
    for (; goes_on && item < num_items; item = items.Next(), ++chunks) {
      goes_on = Collect(p, team, epoch, item - p.num_pulls());
    }
    team.Sync();
    if (team.thread == 0) num_done += chunks;
    bool is_last = goes_on && Complete(&p.group.launch->done, num_done, p.num_last_items());
    if (is_last) TellConsumed(p.group, epoch);
    __syncwarp();
    int64_t worker = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarpSize;
    int64_t num_workers = int64_t{gridDim.x} * kTeams * BackwardTeam::kWarps;
    char* dy = reinterpret_cast<char*>(p.dy);
    ZeroRowsByWarp(p.plan, dy, p.hidden * sizeof(T), worker, num_workers);
    if (is_last) Finish(p.group, epoch, p.group.is_read_in_place());
  }
  End(p.group, [&] {
    PoisonByBlock(p.dy, p.plan.capacity * p.hidden * sizeof(T));
    PoisonByBlock(p.dweights, p.num_weights() * sizeof(float));
  });
}

}  // namespace

cudaError_t LoadGroupCombineBackward() {
  return ForEachFloatType([](auto zero) {
    using T = decltype(zero);
    return LoadKernels(
        GroupCombineBackwardKernel<T>, GroupCombineBackwardBulkKernel<T>, kRingBytes);
  });
}

cudaError_t LaunchGroupCombineBackward(const GroupView& group,
                                       const RegionLayout& layout,
                                       const RowsPlan& plan,
                                       const LaunchLimits& limits,
                                       const CombineBackwardArrays& arrays,
                                       cudaStream_t stream) {
  return WithType(arrays.type, [&](auto zero) {
    using T = decltype(zero);
    bool is_bulk = limits.has_bulk_copy && plan.top_k <= kMaxBulkTopK;
    int64_t hidden = arrays.row_bytes / static_cast<int64_t>(sizeof(T));
    GroupBackwardParams<T> params{};
    static_cast<GroupTokens&>(params) =
        MakeGroupTokens(group, layout, plan, arrays.owners, arrays.weights, hidden, is_bulk);
    params.order = {plan.num_tokens, std::min(plan.num_tokens, kLead)};
    params.parts = PullParts(group.num_ranks, plan.num_tokens, arrays.row_bytes);
    params.dout = static_cast<const T*>(arrays.dout);
    params.y = static_cast<const T*>(arrays.y);
    params.dy = static_cast<T*>(arrays.dy);
    params.dweights = arrays.dweights;
    params.num_dout_chunks =
        group.is_read_in_place() ? 0 : NumChunks(plan.num_tokens * arrays.row_bytes);
    if (is_bulk) {
      GroupCombineBackwardBulkKernel<T>
          <<<limits.num_sms, kRingThreads, kRingBytes, stream>>>(params);
    } else {
      GroupCombineBackwardKernel<T><<<limits.num_sms, kTeams * kThreads, 0, stream>>>(params);
    }
    return cudaGetLastError();
  });
}

}  // namespace jax_moe_ep
