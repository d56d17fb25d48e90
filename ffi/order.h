// In which order a rank takes its work in a group. For host and device: tests look at it without a
// GPU.

#ifndef JAX_MOE_EP_ORDER_H_
#define JAX_MOE_EP_ORDER_H_

#include <cstdint>

#include "divide.h"
#include "host_device.h"
#include "layout.h"
#include "row_parts.h"

namespace jax_moe_ep {

// The rank `offset` places behind `rank`: ranks start at different peers.
JAX_MOE_EP_HOST_DEVICE inline int PeerOf(int rank, int num_ranks, int offset) {
  int peer = rank + offset;
  return peer < num_ranks ? peer : peer - num_ranks;
}

// Pulls: some own tokens, while peers become ready; then one of each rank in turn, so that link and
// memory work side by side; in the end those of the peers alone.
struct PullOrder {
  int64_t num_tokens;
  int64_t lead;  // own tokens first, at most num_tokens

  JAX_MOE_EP_HOST_DEVICE int64_t size(int num_ranks) const { return num_tokens * num_ranks; }

  // The rank and token of a position.
  JAX_MOE_EP_HOST_DEVICE void Find(
      int rank, int num_ranks, int64_t position, int* source, int64_t* token) const {
    *source = rank;
    *token = position;
    if (position < lead) return;
    position -= lead;
    int64_t num_turns = num_tokens - lead;  // of all ranks
    if (position < num_turns * num_ranks) {
      auto [turn, offset] = Divide(position, num_ranks);
      *source = PeerOf(rank, num_ranks, static_cast<int>(offset));
      *token = turn + (offset == 0 ? lead : 0);
      return;
    }
    auto [turn, offset] = Divide(position - num_turns * num_ranks, num_ranks - 1);
    *source = PeerOf(rank, num_ranks, static_cast<int>(offset) + 1);
    *token = num_turns + turn;
  }
};

// From the first to before the end.
struct Piece {
  int64_t first_token, end_token;
  int64_t first_byte, end_byte;  // of each token
};

// How combine cuts the [T, row_bytes] of a rank: a piece is a part of the columns of a run of
// neighbouring tokens. Short batches have many parts, long ones long runs. The same on all ranks.
struct CombinePieces {
  int64_t num_tokens;
  RowParts parts;
  int64_t run_tokens;

  // Pieces, for the machine to be full; for a few SMs less, as a piece has a cost of its own.
  static constexpr int64_t kEnough = 8192;
  static constexpr int64_t kEnoughForFew = 4096;
  static_assert(2 * kEnough <= kMaxPieces, "parts of fewer than kEnough tokens all have flags");

  CombinePieces() = default;
  JAX_MOE_EP_HOST_DEVICE CombinePieces(int64_t num_tokens, int64_t row_bytes, bool has_few_sms)
      : num_tokens(num_tokens),
        parts(num_tokens, row_bytes, has_few_sms ? kEnoughForFew : kEnough) {
    run_tokens = CeilDiv(num_tokens * parts.count, kMaxPieces);
    if (run_tokens == 0) run_tokens = 1;
  }

  JAX_MOE_EP_HOST_DEVICE int64_t size() const {
    return CeilDiv(num_tokens, run_tokens) * parts.count;
  }

  JAX_MOE_EP_HOST_DEVICE Piece At(int64_t piece) const {
    auto [run, part] = Divide(piece, parts.count);
    int64_t token = run * run_tokens, end = token + run_tokens;
    return {token, end < num_tokens ? end : num_tokens, parts.Begin(part), parts.End(part)};
  }
};

// A push: partials of a piece of the peer `offset` places behind; or, with offset 0, the sums of an
// own piece.
struct CombineItem {
  int offset;
  int64_t piece;
};

// combine: pushes of `ahead` pieces to each peer; then sum 0, a push to each peer, sum 1, ...; in
// the end sums alone. Sums find what they wait for there, and both directions of the link and the
// memory work at once.
struct CombineOrder {
  int num_ranks;
  int64_t num_pieces;
  int64_t ahead;  // pieces, at most num_pieces

  JAX_MOE_EP_HOST_DEVICE int64_t size() const { return num_pieces * num_ranks; }

  JAX_MOE_EP_HOST_DEVICE CombineItem Find(int64_t position) const {
    int num_peers = num_ranks - 1;
    if (position < ahead * num_peers) {
      auto [piece, peer] = Divide(position, num_peers);
      return {1 + static_cast<int>(peer), piece};
    }
    position -= ahead * num_peers;
    int64_t num_turns = num_pieces - ahead;  // of a sum and a push to each peer
    if (position < num_turns * num_ranks) {
      auto [turn, offset] = Divide(position, num_ranks);
      return {static_cast<int>(offset), turn + (offset == 0 ? 0 : ahead)};
    }
    return {0, num_turns + position - num_turns * num_ranks};
  }
};

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_ORDER_H_
