#include <algorithm>

#include "combine.h"
#include "combine_group.cuh"
#include "combine_group_bulk.cuh"

namespace jax_moe_ep {
namespace {

constexpr int kTeams = 5;  // of one block an SM: the other SMs stay free
constexpr int kThreads = 128;
using CombineTeam = Team<kThreads, kTeams>;
// Pushes to each peer before the first sum. Measured where 1,488 warps claimed: with half as many
// sums waited for them, twice as many left memory idle while the link was busy.
constexpr int64_t kPiecesAhead = 1024;

__device__ bool HasRow(const int32_t* slots, int top_k) {
  bool has = false;
  for (int k = 0; k < top_k; ++k) has |= slots[k] >= 0;
  return has;
}

// Calls use(index) for the vectors of the piece's columns, divided among the team's threads.
template <typename Use>
__device__ void ForEachVector(const CombineTeam& team, const Piece& piece, Use use) {
  int64_t end = piece.end_byte / kVecBytes;
  for (int64_t i = piece.first_byte / kVecBytes + team.thread; i < end; i += kThreads) {
    use(i);
  }
}

// False when a rank gave up.
template <typename T>
__device__ bool Push(const GroupCombineParams<T>& p,
                     const CombineTeam& team,
                     TeamReady<CombineTeam>& ready,
                     uint64_t epoch,
                     const CombineItem& item) {
  Piece piece = p.pieces.At(item.piece);
  int source = Peer(p.group, item.offset);
  if (!ready.Wait(p.group, team, epoch, source)) return false;
  T* landing = p.Landing(source, p.group.rank, epoch);
  bool has_any = false;
  for (int64_t token = piece.first_token; token < piece.end_token; ++token) {
    const int32_t* slots = p.Slots(source, token);
    if (!HasRow(slots, p.plan.top_k)) continue;
    has_any = true;
    const float* weights = p.Weights(source, token, epoch);
    ForEachVector(team, piece, [&](int64_t index) {
      float sums[Vec<T>::kSize] = {};
      SumRows(p.y, p.hidden, slots, weights, p.plan.top_k, index, sums);
      Vec<T>::Round(sums).Store(landing + token * p.hidden, index);
    });
  }
  if (!has_any) return true;  // owners say so: nobody waits
  team.Sync();
  if (team.thread == 0) {
    StoreReleaseSystem(p.LandedFlag(source, p.group.rank, item.piece, epoch), epoch);
  }
  return true;
}

// Ranks that hold a row of the token, a bit a rank.
__device__ uint32_t Owners(const int32_t* owners, int top_k) {
  uint32_t ranks = 0;
  for (int k = 0; k < top_k; ++k) {
    if (owners[k] >= 0) ranks |= 1u << owners[k];
  }
  return ranks;
}

// The token's partials in rank order, from +0; the own one is made here.
template <typename T>
__device__ void SumToken(const GroupCombineParams<T>& p,
                         const CombineTeam& team,
                         uint64_t epoch,
                         const Piece& piece,
                         int64_t token) {
  int me = p.group.rank, top_k = p.plan.top_k;
  uint32_t ranks = Owners(p.owners + token * top_k, top_k);
  const int32_t* slots = p.Slots(me, token);
  const float* weights = p.Weights(me, token, epoch);
  ForEachVector(team, piece, [&](int64_t index) {
    Vec<T> own{};
    if (ranks >> me & 1) {
      float sums[Vec<T>::kSize] = {};
      SumRows(p.y, p.hidden, slots, weights, top_k, index, sums);
      own = Vec<T>::Round(sums);
    }
    float sums[Vec<T>::kSize] = {};
    for (int rank = 0; rank < p.group.num_ranks; ++rank) {
      if (!(ranks >> rank & 1)) continue;
      Vec<T> partial = own;
      if (rank != me) {
        partial = Vec<T>::Load(p.Landing(me, rank, epoch) + token * p.hidden, index);
      }
#pragma unroll
      for (int j = 0; j < Vec<T>::kSize; ++j) sums[j] = __fadd_rn(sums[j], partial.Get(j));
    }
    Vec<T>::Round(sums).Store(p.out + token * p.hidden, index);
  });
}

// False when a rank gave up.
template <typename T>
__device__ bool Sum(const GroupCombineParams<T>& p,
                    const CombineTeam& team,
                    uint64_t epoch,
                    int64_t number) {
  Piece piece = p.pieces.At(number);
  bool has_landed = true;
  if (team.thread < p.group.num_ranks && team.thread != p.group.rank) {
    uint32_t ranks = 0;
    for (int64_t token = piece.first_token; token < piece.end_token; ++token) {
      ranks |= Owners(p.owners + token * p.plan.top_k, p.plan.top_k);
    }
    if (ranks >> team.thread & 1) {
      const uint64_t* flag = p.LandedFlag(p.group.rank, team.thread, number, epoch);
      has_landed = WaitForFlag(p.group, flag, epoch, Phase::kLanded, team.thread);
    }
  }
  if (!team.And(has_landed)) return false;
  for (int64_t token = piece.first_token; token < piece.end_token; ++token) {
    SumToken(p, team, epoch, piece, token);
  }
  return true;
}

// Inputs: plan, owners, y, weights; writes all of out, partials into the peers' landing areas and
// weights into their tables, or few ones into words. Launch: any number of blocks of kTeams *
// kThreads. The steps are those of protocol.cuh; a flag landed[p][piece] is raised by rank p when
// its partials of the piece are there. The sums have a fixed order, whatever lands first. A claimed
// push waits for no sum, on any rank: with sum u stuck, a team has claimed push u + ahead, so a
// cycle of ranks would need ever smaller u.
//
// Example (R = 2, K = 2, H = 1 of 4 copies): rank 0's token has weights (2, 0.5) and owners (0, 1);
// y = 1 there and 4 on rank 1, whose partial 2 lands: 0 + 2*1 + 2 = 4.
template <typename T>
__global__ void __launch_bounds__(kTeams* kThreads, 1)
    GroupCombineKernel(const __grid_constant__ GroupCombineParams<T> p) {
  __shared__ BlockCall call;
  __shared__ int64_t claims[kTeams];
  Begun begun = Begin(p.group, p.num_staged_weights() > 0, call);
  uint64_t epoch = begun.epoch;
  if (epoch != kAborted) {
    int64_t num_done = begun.num_told + StageWeights(p, epoch);
    const CombineTeam team;
    TeamItems<CombineTeam> items(p.group, team, &claims[team.id]);
    TeamReady<CombineTeam> ready;
    int64_t count = 0;
    for (int64_t position; (position = items.Next()) < p.order.size(); ++count) {
      CombineItem item = p.order.Find(position);
      bool is_done =
          item.offset == 0 ? Sum(p, team, epoch, item.piece) : Push(p, team, ready, epoch, item);
      if (!is_done) break;
    }
    team.Sync();
    num_done += team.thread == 0 ? count : 0;
    if (Complete(&p.group.launch->done, num_done, p.num_items())) {
      TellConsumed(p.group, epoch);
      Finish(p.group, epoch, false);
    }
  }
  End(p.group, [&] { PoisonByBlock(p.out, p.plan.num_tokens * p.hidden * sizeof(T)); });
}

}  // namespace

cudaError_t LoadGroupCombine() {
  return ForEachFloatType([](auto zero) {
    using T = decltype(zero);
    return LoadKernels(GroupCombineKernel<T>, GroupCombineBulkKernel<T>, kRingBytes);
  });
}

cudaError_t LaunchGroupCombine(const GroupView& group,
                               const RegionLayout& layout,
                               const RowsPlan& plan,
                               const LaunchLimits& limits,
                               const CombineArrays& arrays,
                               cudaStream_t stream) {
  return WithType(arrays.type, [&](auto zero) {
    using T = decltype(zero);
    bool is_bulk = limits.has_bulk_copy && plan.top_k <= kMaxBulkTopK;
    int64_t hidden = arrays.row_bytes / static_cast<int64_t>(sizeof(T));
    GroupCombineParams<T> params{};
    static_cast<GroupTokens&>(params) =
        MakeGroupTokens(group, layout, plan, arrays.owners, arrays.weights, hidden, is_bulk);
    params.y = static_cast<const T*>(arrays.y);
    params.out = static_cast<T*>(arrays.out);
    params.pieces = CombinePieces(plan.num_tokens, arrays.row_bytes, arrays.has_few_sms);
    int64_t ahead = std::min(params.pieces.size(), kPiecesAhead);
    params.order = {group.num_ranks, params.pieces.size(), ahead};
    if (is_bulk) {
      GroupCombineBulkKernel<T><<<limits.num_sms, kRingThreads, kRingBytes, stream>>>(params);
    } else {
      GroupCombineKernel<T><<<limits.num_sms, kTeams * kThreads, 0, stream>>>(params);
    }
    return cudaGetLastError();
  });
}

}  // namespace jax_moe_ep
