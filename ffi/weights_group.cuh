// How routing weights cross between the ranks of a group: few in tagged words, many in a table that
// is staged.

#ifndef JAX_MOE_EP_WEIGHTS_GROUP_CUH_
#define JAX_MOE_EP_WEIGHTS_GROUP_CUH_

#include "protocol.cuh"

namespace jax_moe_ep {
namespace {

// Few weights cross in two tagged words each, 16 bits in one.
using WeightWords = TaggedWords<16>;
constexpr int kMaxFewWeights = kMaxFewWords / 2;  // of all ranks

// A weight from its pair of words. False when it has not come.
__device__ inline bool ReadWeight(const uint64_t* pair, WeightWords words, float* weight) {
  uint64_t low = LoadRelaxedSystem(&pair[0]), high = LoadRelaxedSystem(&pair[1]);
  uint64_t bits = WeightWords::Number(low) | WeightWords::Number(high) << 16;
  *weight = __uint_as_float(static_cast<uint32_t>(bits));
  return words.Has(low) && words.Has(high);
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

  __device__ int64_t num_weights() const { return plan.num_tokens * plan.top_k; }
  // Chunks of them, and of those that cross in a table or in words.
  __device__ int64_t num_weight_chunks() const { return NumWarpChunks(num_weights()); }
  __device__ int64_t num_staged_weights() const {
    return weights != nullptr && !has_few_weights ? num_weight_chunks() : 0;
  }
  __device__ int64_t num_sent_weights() const { return has_few_weights ? num_weight_chunks() : 0; }

  // Rank `source`'s weights [T, K] in rank `owner`'s memory: a table, or pairs of words.
  __device__ float* WeightTable(int owner, int source, uint64_t epoch) const {
    char* tables = Half(group, owner, epoch) + layout.weights;
    return reinterpret_cast<float*>(tables) + source * num_weights();
  }
  __device__ uint64_t* FewWeights(int owner, int source, uint64_t epoch) const {
    return group.controls[owner]->few_words[epoch & 1] + 2 * source * num_weights();
  }

  // A warp writes a chunk of this rank's weights into every peer's table.
  __device__ void PushWeights(uint64_t epoch, int64_t chunk) const {
    WarpChunk<float> numbers(chunk, num_weights());
    numbers.Load(weights);
    for (int offset = 1; offset < group.num_ranks; ++offset) {
      numbers.Store(WeightTable(Peer(group, offset), group.rank, epoch));
    }
  }

  // The rows of a token of rank `source` here, -1 elsewhere, and its weights, which are here or
  // staged.
  __device__ const int32_t* Slots(int source, int64_t token) const {
    return plan.slots + (source * plan.num_tokens + token) * plan.top_k;
  }
  __device__ const float* Weights(int source, int64_t token, uint64_t epoch) const {
    if (weights == nullptr) return nullptr;
    const float* table = source == group.rank ? weights : WeightTable(group.rank, source, epoch);
    return table + token * plan.top_k;
  }

  // A warp: the weight of k = lane. The source must be ready, unless few weights cross in words.
  // False when a rank gave up, or the source is in another call; the same in all lanes.
  __device__ bool LoadWeights(int source, int64_t token, uint64_t epoch, float* weight) const {
    int lane = threadIdx.x % kWarpSize;
    if (!has_few_weights || source == group.rank) {
      if (lane < plan.top_k) *weight = Weights(source, token, epoch)[lane];
      return true;
    }
    bool is_there = true;
    if (lane < plan.top_k) {
      WeightWords words(group, epoch);
      const uint64_t* pair = FewWeights(group.rank, source, epoch);
      pair += 2 * (token * plan.top_k + lane);
      is_there = WaitForWords(
          group, epoch, source, words.At(pair, 2), [&] { return ReadWeight(pair, words, weight); });
    }
    return !__any_sync(kAllLanes, !is_there);
  }
};

// reads_words: the kernel can. With few weights the call is one of its own: ranks that would send
// theirs otherwise are in another one.
inline GroupTokens MakeGroupTokens(const GroupView& group,
                                   const RegionLayout& layout,
                                   const RowsPlan& plan,
                                   const int32_t* owners,
                                   const float* weights,
                                   int64_t hidden,
                                   bool reads_words) {
  int64_t num_weights = group.num_ranks * plan.num_tokens * plan.top_k;
  bool has_few_weights = reads_words && weights != nullptr && num_weights <= kMaxFewWeights;
  GroupTokens tokens{group, layout, plan, owners, weights, hidden, has_few_weights};
  if (has_few_weights) {
    CallSignature& signature = tokens.group.signature;
    signature.options = ~signature.options;
    tokens.group.hash = Hash(signature);
  }
  return tokens;
}

// A warp that sends chunks of this rank's few weights. The first one is claimed and loaded before
// the call begins. It waits for no peer before it has sent all that it claimed.
class FewWeightsSender {
 public:
  __device__ FewWeightsSender(const GroupTokens& tokens, bool sends) : tokens_(tokens) {
    if (sends && tokens.has_few_weights) Claim();
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
    int64_t number = ClaimByWarp(tokens_.group, &tokens_.group.launch->sending);
    int64_t chunk = min(number, tokens_.num_weight_chunks());
    chunk_ = WarpChunk<float>(chunk, tokens_.num_weights());
    chunk_.Load(tokens_.weights);
  }

  __device__ void Send(uint64_t epoch, const WarpChunk<float>& chunk) const {
    const GroupView& group = tokens_.group;
    WeightWords words(group, epoch);
#pragma unroll 1
    for (int offset = 1; offset < group.num_ranks; ++offset) {
      uint64_t* there = tokens_.FewWeights(Peer(group, offset), group.rank, epoch);
#pragma unroll
      for (int j = 0; j < kUnitsPerLane; ++j) {
        if (chunk.At(j) >= chunk.end) continue;
        uint32_t bits = __float_as_uint(chunk.units[j]);
        StoreRelaxedSystem(&there[2 * chunk.At(j)], words.Make(bits));
        StoreRelaxedSystem(&there[2 * chunk.At(j) + 1], words.Make(bits >> 16));
      }
    }
  }

  const GroupTokens& tokens_;
  WarpChunk<float> chunk_{0, 0};
};

}  // namespace
}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_WEIGHTS_GROUP_CUH_
