// What the kernels of combine and its backward share in a group: where partials land, how work is
// claimed.

#ifndef JAX_MOE_EP_COMBINE_GROUP_CUH_
#define JAX_MOE_EP_COMBINE_GROUP_CUH_

#include "combine_rows.cuh"
#include "weights_group.cuh"

namespace jax_moe_ep {
namespace {

constexpr int kMaxBulkTopK = kWarpSize;  // of the bulk paths: a lane a k

// combine of one rank. Its work is cut into pieces: some columns of neighbouring tokens, each with
// a flag of its own. All ranks cut alike.
template <typename T>
struct GroupCombineParams : GroupTokens {
  const T* y;  // [C, H]
  T* out;      // [T, H]
  CombinePieces pieces;
  CombineOrder order;

  // Pushes and sums, and what the peers are told.
  __device__ int64_t num_items() const { return order.size() + 1 + num_sent_weights(); }

  // Where rank `sender`'s partials [T, H] of rank `receiver`'s tokens land.
  __device__ T* Landing(int receiver, int sender, uint64_t epoch) const {
    int64_t place = sender < receiver ? sender : sender - 1;  // nothing lands from oneself
    char* landing = Half(group, receiver, epoch) + layout.landing;
    return reinterpret_cast<T*>(landing) + place * plan.num_tokens * hidden;
  }

  // In rank `at`'s memory: raised by rank `sender` when its partials of the piece are there.
  __device__ uint64_t* LandedFlag(int at, int sender, int64_t piece, uint64_t epoch) const {
    return &group.controls[at]->landed[epoch & 1][sender][piece];
  }
};

// Weights that do not cross in words. 1 for the lane that has told the peers.
template <typename T>
__device__ int StageWeights(const GroupCombineParams<T>& p, uint64_t epoch) {
  return Stage(
      p.group, epoch, p.num_staged_weights(), [&](int64_t chunk) { p.PushWeights(epoch, chunk); });
}

// A team's claims. The next one is asked for before the work on this one.
template <typename Team>
struct TeamItems {
  const GroupView& group;
  const Team& team;
  int64_t* shared;  // of the team
  int64_t next = 0;

  __device__ TeamItems(const GroupView& group, const Team& team, int64_t* shared)
      : group(group), team(team), shared(shared) {
    Ask();
  }

  // All threads of the team get the same.
  __device__ int64_t Next() {
    if (team.thread == 0) *shared = next;
    team.Sync();
    int64_t item = *shared;
    team.Sync();
    Ask();
    return item;
  }

 private:
  __device__ void Ask() {
    if (team.thread == 0) next = Claim(group, &group.launch->claims);
  }
};

// Which ranks a team has seen ready. The same in all of its threads.
template <typename Team>
struct TeamReady {
  uint32_t ranks = 0;  // a bit a rank

  // False when a rank gave up.
  __device__ bool Wait(const GroupView& group, const Team& team, uint64_t epoch, int source) {
    if (ranks >> source & 1) return true;
    bool is_ready = team.thread != 0 || WaitForReady(group, epoch, source);
    if (!team.And(is_ready)) return false;
    ranks |= 1u << source;
    return true;
  }
};

}  // namespace
}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_COMBINE_GROUP_CUH_
