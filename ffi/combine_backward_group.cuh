// What the kernels of combine's backward share in a group.

#ifndef JAX_MOE_EP_COMBINE_BACKWARD_GROUP_CUH_
#define JAX_MOE_EP_COMBINE_BACKWARD_GROUP_CUH_

#include "combine_group.cuh"
#include "row_parts.h"

namespace jax_moe_ep {
namespace {

// A part of the columns of a token.
struct Pull {
  int source;  // the token's rank
  int64_t token;
  int64_t part;
  int64_t first_byte, end_byte;  // of the row
};

template <typename T>
struct GroupBackwardParams : GroupTokens {
  PullOrder order;
  RowParts parts;
  const T* dout;            // [T, H]
  const T* y;               // [C, H]
  T* dy;                    // [C, H]
  float* dweights;          // [T, K]
  int64_t num_dout_chunks;  // to stage; 0: peers read dout where it is

  __device__ int64_t num_staged() const { return num_staged_weights() + num_dout_chunks; }
  // That end the call: chunks of dweights, and what the peers are told.
  __device__ int64_t num_last_items() const { return num_weight_chunks() + 1 + num_sent_weights(); }
  __device__ int64_t num_pulls() const { return order.size(group.num_ranks) * parts.count; }
  __device__ Pull PullAt(int64_t position) const {
    Pull pull;
    auto [token, part] = Divide(position, parts.count);
    order.Find(group.rank, group.num_ranks, token, &pull.source, &pull.token);
    pull.part = part;
    pull.first_byte = parts.Begin(part);
    pull.end_byte = parts.End(part);
    return pull;
  }

  // Rank `source`'s gradients [T, H], once it is ready.
  __device__ const T* Gradients(int source, uint64_t epoch) const {
    const char* own = reinterpret_cast<const char*>(dout);
    return reinterpret_cast<const T*>(TokensOf(group, epoch, source, own, layout.staging));
  }
  // Weight gradients of a part [T, K], in rank `source`'s memory; and those of a pull's token
  // there.
  __device__ float* WeightGradients(int source, int64_t part, uint64_t epoch) const {
    char* tables = Half(group, source, epoch) + layout.dweights;
    return reinterpret_cast<float*>(tables) + part * num_weights();
  }
  __device__ float* WeightGradients(const Pull& pull, uint64_t epoch) const {
    return WeightGradients(pull.source, pull.part, epoch) + pull.token * plan.top_k;
  }
};

// 1 for the lane that has told the peers.
template <typename T>
__device__ int StageGradients(const GroupBackwardParams<T>& p, uint64_t epoch) {
  uint4* to = reinterpret_cast<uint4*>(Half(p.group, p.group.rank, epoch) + p.layout.staging);
  int64_t vectors = p.plan.num_tokens * (p.hidden / Vec<T>::kSize);
  return Stage(p.group, epoch, p.num_staged(), [&](int64_t chunk) {
    if (chunk < p.num_staged_weights()) {
      p.PushWeights(epoch, chunk);
    } else {
      const uint4* from = reinterpret_cast<const uint4*>(p.dout);
      CopyChunk(from, to, chunk - p.num_staged_weights(), vectors);
    }
  });
}

// One thread: adds pulls that are done; whoever adds the last tells all ranks that its weight
// gradients are there. This rank is told last: once it knows, nothing is left to be told.
template <typename T>
__device__ void CompletePulls(const GroupBackwardParams<T>& p, uint64_t epoch, int64_t count) {
  if (!Complete(&p.group.launch->pulled, count, p.num_pulls())) return;
  TellPeers(p.group, epoch, [&](Control* peer) { return &peer->returned[p.group.rank]; });
  StoreReleaseDevice(&OwnControl(p.group)->returned[p.group.rank], epoch);
}

}  // namespace
}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_COMBINE_BACKWARD_GROUP_CUH_
