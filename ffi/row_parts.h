// How rows are cut where tokens are few for all warps of a GPU.

#ifndef JAX_MOE_EP_ROW_PARTS_H_
#define JAX_MOE_EP_ROW_PARTS_H_

#include <cstdint>

#include "divide.h"
#include "host_device.h"

namespace jax_moe_ep {

// The parts of a row, all of one size but the last. An empty row has none.
struct RowParts {
  static constexpr int64_t kLeastBytes = 4096;

  int64_t row_bytes = 0;
  int64_t bytes = kLeastBytes;  // of a part, a multiple of it
  int64_t count = 0;

  RowParts() = default;
  // enough: parts of all tokens together.
  JAX_MOE_EP_HOST_DEVICE RowParts(int64_t num_tokens, int64_t row_bytes, int64_t enough)
      : row_bytes(row_bytes) {
    int64_t most = row_bytes > 0 ? CeilDiv(row_bytes, kLeastBytes) : 1;
    int64_t wanted = num_tokens > 0 ? CeilDiv(enough, num_tokens) : 1;
    bytes = CeilDiv(most, wanted < most ? wanted : most) * kLeastBytes;
    count = CeilDiv(row_bytes, bytes);
  }

  // In bytes of the row.
  JAX_MOE_EP_HOST_DEVICE int64_t Begin(int64_t part) const { return part * bytes; }
  JAX_MOE_EP_HOST_DEVICE int64_t End(int64_t part) const {
    int64_t end = Begin(part) + bytes;
    return end < row_bytes ? end : row_bytes;
  }
};

// Those of combine's backward, on all ranks alike: a part of a token of any rank is a pull.
inline constexpr int64_t kEnoughPulls = 4096;
JAX_MOE_EP_HOST_DEVICE inline RowParts PullParts(int num_ranks,
                                                 int64_t num_tokens,
                                                 int64_t row_bytes) {
  return {num_ranks * num_tokens, row_bytes, kEnoughPulls};
}

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_ROW_PARTS_H_
