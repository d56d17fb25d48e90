// The memory that the ranks of a group share, and what they say in it: the only description of its
// bytes, for host and device.
//
// Every rank owns one Control and some regions, in its own device memory, mapped by all ranks of
// the group. A call writes to the halves of parity epoch & 1 only.

#ifndef JAX_MOE_EP_LAYOUT_H_
#define JAX_MOE_EP_LAYOUT_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "divide.h"
#include "host_device.h"
#include "row_parts.h"

namespace jax_moe_ep {

inline constexpr int kMaxRanks = 16;                  // GPUs of one host
inline constexpr int kMaxPieces = 16 * 1024;          // of one rank's partials, each with a flag
inline constexpr int kMaxFewWords = 256 * 1024;       // of all ranks: tagged_words.cuh
inline constexpr int64_t kPartAlignment = 256;        // of the parts of a region
inline constexpr int64_t kAllocationBytes = 2 << 20;  // cudaIpc maps whole multiples of this
inline constexpr int64_t kRegionHeaderBytes = 256;    // its proof
inline constexpr int64_t kMinHalfBytes = 1 << 20;

enum class Op : int32_t { kNone, kDispatch, kCombine, kCombineBackward, kGather, kPlan };

// What all ranks must agree on in one call: a difference is an error that shows both.
struct CallSignature {
  Op op;
  int32_t top_k;
  int64_t num_tokens;
  int64_t row_bytes;
  uint64_t options;  // a hash of what else must be equal
};

inline constexpr int kSignatureWords = sizeof(CallSignature) / 2;  // 16 bits in one

// All bits of it, mixed.
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

// Effects that tests ask for, on one rank.
struct Fault {
  uint64_t delay_ns;  // before the rank begins a call
  uint32_t skips;     // the rank takes no part
};

// Flags hold epochs, which only grow; `x[p]` is written by rank p alone. An allocation that is
// shared begins with the proof that rank p reaches it: it reads here what the owner, and writes
// what p said.
struct Control {
  uint64_t proof[kMaxRanks];

  // This rank's own.
  uint64_t turn;        // 2 * the epoch of the last finished call, + 1 while another runs
  uint32_t has_failed;  // the failure has been written to the host
  Fault fault;

  // Any rank's.
  uint32_t abort;  // 1 + the rank that gave up first; sticky

  // Tagged words, by parity: p's data can be read, and where; in which call p is.
  uint64_t places[2][kMaxRanks][2];
  uint64_t signatures[2][kMaxRanks][kSignatureWords];
  uint64_t consumed[kMaxRanks];               // p reads nothing of this epoch and before any more
  uint64_t returned[kMaxRanks];               // p's weight gradients of this epoch are here
  uint64_t landed[2][kMaxRanks][kMaxPieces];  // by parity: p's partials of a piece are here
  uint64_t few_words[2][kMaxFewWords];        // by parity: tagged words of all ranks
};

// Counters of the launches of one call site on one device: never two at a time. Zero in between.
struct LaunchState {
  uint32_t arrivals;  // blocks that have begun, where there are several
  uint32_t exits;     // blocks that have ended, likewise
  uint64_t epoch;     // of the call, once the first block has it, or kAborted
  uint64_t sending;   // chunks of few weights claimed
  uint64_t staging;   // chunks to stage claimed
  uint64_t staged;    // and done
  uint64_t claims;    // items claimed
  uint64_t pulled;    // pulls done, where other items come after them
  uint64_t done;      // items done
};
inline constexpr uint64_t kAborted = ~uint64_t{0};
inline constexpr int64_t kLaunchStateBytes = 128;  // a line of its own
static_assert(sizeof(LaunchState) <= kLaunchStateBytes);

// Where a wait was, for the error.
enum class Phase : uint32_t { kNone, kLock, kConsumed, kReady, kLanded, kReturned, kFinish };

enum class FailureKind : uint32_t { kNone, kTimeout, kMismatch, kPeer };

// In mapped host memory, written once by the device.
struct Failure {
  FailureKind kind;
  Phase phase;
  int32_t rank;
  int32_t peer;
  uint64_t expected;  // epochs
  uint64_t seen;
  uint64_t waited_ns;
  CallSignature mine;
  CallSignature theirs;
};

// A group as a kernel of one rank sees it. num_ranks = 1: all else is unused.
struct GroupView {
  int num_ranks;
  int rank;
  uint64_t timeout_ns;
  int64_t half_bytes;  // of a region
  CallSignature signature;
  uint64_t hash;  // of the signature
  LaunchState* launch;
  Failure* failure;
  Control* controls[kMaxRanks];
  char* regions[kMaxRanks];
  const char* published[kMaxRanks];  // x as each peer has it mapped, or null: x must be staged

  // Whether peers read this rank's x where XLA has it.
  JAX_MOE_EP_HOST_DEVICE bool is_read_in_place() const { return published[rank] != nullptr; }
};

// What cudaMalloc and cudaIpc deal in.
inline int64_t RoundToAllocation(int64_t bytes) {
  return CeilDiv(bytes, kAllocationBytes) * kAllocationBytes;
}

JAX_MOE_EP_HOST_DEVICE inline int64_t AlignPart(int64_t bytes) {
  return CeilDiv(bytes, kPartAlignment) * kPartAlignment;
}

// The parts of one half of a region for one call. Offsets in bytes.
struct RegionLayout {
  int64_t staging = 0;   // [T, row_bytes] this rank's tokens
  int64_t landing = 0;   // [R - 1, T, row_bytes] partials of the peers
  int64_t weights = 0;   // [R, T, K] fp32 weights of all ranks
  int64_t dweights = 0;  // [parts, T, K] fp32 weight gradients of this rank, by parts of rows
  int64_t gathered = 0;  // [R, T, row_bytes] what all ranks gave to gather or plan of many
  int64_t total = 0;

  RegionLayout() = default;
  JAX_MOE_EP_HOST_DEVICE RegionLayout(Op op,
                                      bool is_one_process,
                                      bool has_weights,
                                      int num_ranks,
                                      int64_t num_tokens,
                                      int64_t top_k,
                                      int64_t row_bytes) {
    int64_t tokens = num_tokens * row_bytes, table = num_tokens * top_k * 4;
    bool is_pulled = op == Op::kDispatch || op == Op::kCombineBackward;
    if (is_pulled && !is_one_process) staging = Take(tokens);
    if (op == Op::kCombine) landing = Take((num_ranks - 1) * tokens);
    if (has_weights) weights = Take(num_ranks * table);
    if (op == Op::kCombineBackward) {
      dweights = Take(PullParts(num_ranks, num_tokens, row_bytes).count * table);
    }
    if (op == Op::kGather || op == Op::kPlan) gathered = Take(num_ranks * tokens);
  }

 private:
  JAX_MOE_EP_HOST_DEVICE int64_t Take(int64_t bytes) {
    int64_t start = total;
    total += AlignPart(bytes);
    return start;
  }
};

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_LAYOUT_H_
