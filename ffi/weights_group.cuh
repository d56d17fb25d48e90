// How routing weights cross between the ranks of a group: few in tagged words, many in a table that
// is staged.

#ifndef JAX_MOE_EP_WEIGHTS_GROUP_CUH_
#define JAX_MOE_EP_WEIGHTS_GROUP_CUH_

#include "protocol.cuh"

namespace jax_moe_ep {
namespace {

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
  WarpChunk<float> numbers(chunk, plan.num_tokens * plan.top_k);
  numbers.Load(weights);
  for (int offset = 1; offset < group.num_ranks; ++offset) {
    numbers.Store(WeightTable(group, layout, plan, Peer(group, offset), group.rank, epoch));
  }
}

// Few weights cross in two tagged words each, 16 bits in one.
using WeightWords = TaggedWords<16>;
constexpr int kMaxFewWeights = kMaxFewWords / 2;  // of all ranks

inline bool AreFewWeights(const GroupView& group, const RowsPlan& plan) {
  return group.num_ranks * plan.num_tokens * plan.top_k <= kMaxFewWeights;
}

// As a call of its own: ranks that would send theirs otherwise are in another one.
inline GroupView WithFewWeights(GroupView group) {
  group.signature.options = ~group.signature.options;
  group.hash = Hash(group.signature);
  return group;
}

// The words of rank `source`'s weights [T, K] in rank `owner`'s memory.
__device__ inline uint64_t* FewWeights(
    const GroupView& group, const RowsPlan& plan, int owner, int source, uint64_t epoch) {
  uint64_t* words = group.controls[owner]->few_words[epoch & 1];
  return words + 2 * source * plan.num_tokens * plan.top_k;
}

// A warp that sends chunks of this rank's weights. The first one is claimed and loaded before the
// call begins. It waits for no peer before it has sent all that it claimed.
class FewWeightsSender {
 public:
  __device__ FewWeightsSender(const GroupView& group,
                              const RowsPlan& plan,
                              const float* weights,
                              bool sends)
      : group_(group), plan_(plan), weights_(weights) {
    if (sends) Claim();
  }

  // All that are left. Returns how many, in lane 0.
  __device__ int Send(uint64_t epoch) {
    int count = 0;
    for (; chunk_.begin < chunk_.end; Claim()) {
      Send(epoch, chunk_);
      ++count;
    }
    return threadIdx.x % kWarpSize == 0 ? count : 0;
  }

 private:
  __device__ void Claim() {
    int64_t number = ClaimByWarp(group_, &group_.launch->sending);
    int64_t num_weights = plan_.num_tokens * plan_.top_k;
    chunk_ = WarpChunk<float>(min(number, NumWarpChunks(num_weights)), num_weights);
    chunk_.Load(weights_);
  }

  __device__ void Send(uint64_t epoch, const WarpChunk<float>& chunk) const {
    WeightWords words(group_, epoch);
#pragma unroll 1
    for (int offset = 1; offset < group_.num_ranks; ++offset) {
      uint64_t* there = FewWeights(group_, plan_, Peer(group_, offset), group_.rank, epoch);
#pragma unroll
      for (int j = 0; j < kUnitsPerLane; ++j) {
        if (chunk.At(j) >= chunk.end) continue;
        uint32_t bits = __float_as_uint(chunk.units[j]);
        StoreRelaxedSystem(&there[2 * chunk.At(j)], words.Make(bits));
        StoreRelaxedSystem(&there[2 * chunk.At(j) + 1], words.Make(bits >> 16));
      }
    }
  }

  const GroupView& group_;
  const RowsPlan& plan_;
  const float* weights_;
  WarpChunk<float> chunk_{0, 0};
};

// A weight from its pair of words. False when it has not come.
__device__ inline bool ReadWeight(const uint64_t* pair, WeightWords words, float* weight) {
  uint64_t low = LoadRelaxedSystem(&pair[0]), high = LoadRelaxedSystem(&pair[1]);
  uint64_t bits = WeightWords::Number(low) | WeightWords::Number(high) << 16;
  *weight = __uint_as_float(static_cast<uint32_t>(bits));
  return words.Has(low) && words.Has(high);
}

// One thread: weight `place` of rank `source`, a peer, once it has come. False when a rank gave up,
// or the peer is in another call.
__device__ inline bool ReceiveWeight(const GroupView& group,
                                     const RowsPlan& plan,
                                     uint64_t epoch,
                                     int source,
                                     int64_t place,
                                     float* weight) {
  const uint64_t* pair = FewWeights(group, plan, group.rank, source, epoch) + 2 * place;
  WeightWords words(group, epoch);
  return WaitForWords(
      group, epoch, source, words.At(pair, 2), [&] { return ReadWeight(pair, words, weight); });
}

// What combine and its backward have of the tokens of all ranks.
struct GroupTokens {
  GroupView group;
  RegionLayout layout;
  RowsPlan plan;
  const int32_t* owners;  // [T, K]
  const float* weights;   // [T, K]; combine: or null
  int64_t hidden;         // H
  bool has_few_weights;   // of peers, in words

  __host__ __device__ int64_t num_weights() const { return plan.num_tokens * plan.top_k; }

  // The rows of a token of rank `source` here, -1 elsewhere, and its weights, which are here or
  // staged.
  __device__ const int32_t* Slots(int source, int64_t token) const {
    return plan.slots + (source * plan.num_tokens + token) * plan.top_k;
  }
  __device__ const float* Weights(int source, int64_t token, uint64_t epoch) const {
    if (weights == nullptr) return nullptr;
    const float* table = source == group.rank
                             ? weights
                             : WeightTable(group, layout, plan, group.rank, source, epoch);
    return table + token * plan.top_k;
  }

  // A warp: the weight of k = lane. The source must be ready, unless few weights cross in words.
  // False as ReceiveWeight, the same in all lanes.
  __device__ bool LoadWeights(int source, int64_t token, uint64_t epoch, float* weight) const {
    int lane = threadIdx.x % kWarpSize;
    bool is_there = true;
    if (!has_few_weights || source == group.rank) {
      if (lane < plan.top_k) *weight = Weights(source, token, epoch)[lane];
      return true;
    }
    if (lane < plan.top_k) {
      is_there = ReceiveWeight(group, plan, epoch, source, token * plan.top_k + lane, weight);
    }
    return !__any_sync(kAllLanes, !is_there);
  }
};

}  // namespace
}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_WEIGHTS_GROUP_CUH_
