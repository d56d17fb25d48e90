// What combine and its backward share in a group: the tables of weights, and where partials land.

#ifndef JAX_MOE_EP_COMBINE_GROUP_CUH_
#define JAX_MOE_EP_COMBINE_GROUP_CUH_

#include "combine_rows.cuh"
#include "protocol.cuh"

namespace jax_moe_ep {
namespace {

constexpr int kTableChunk = 1024;  // numbers

__host__ __device__ inline int64_t NumTableChunks(int64_t size) {
  return (size + kTableChunk - 1) / kTableChunk;
}

// Rank `source`'s weights [T, K] in rank `owner`'s memory.
__device__ inline float* WeightTable(const GroupView& group,
                                     const RegionLayout& layout,
                                     const RowsPlan& plan,
                                     int owner,
                                     int source,
                                     uint64_t epoch) {
  char* tables = Half(group, owner, epoch) + layout.weights;
  return reinterpret_cast<float*>(tables) + source * plan.num_tokens * plan.top_k;
}

// A warp writes a chunk of this rank's weights into every peer's table.
__device__ inline void PushWeights(const GroupView& group,
                                   const RegionLayout& layout,
                                   const RowsPlan& plan,
                                   const float* weights,
                                   uint64_t epoch,
                                   int64_t chunk) {
  int64_t end = min((chunk + 1) * kTableChunk, plan.num_tokens * plan.top_k);
  for (int offset = 1; offset < group.num_ranks; ++offset) {
    float* table = WeightTable(group, layout, plan, Peer(group, offset), group.rank, epoch);
#pragma unroll 4
    for (int64_t i = chunk * kTableChunk + threadIdx.x % kWarpSize; i < end; i += kWarpSize) {
      table[i] = weights[i];
    }
  }
}

// A team's claims. The next one is asked for before the work on this one, whose time hides its
// latency.
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
