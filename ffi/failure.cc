#include "failure.h"

namespace jax_moe_ep {
namespace {

const char* Name(Op op) {
  switch (op) {
    case Op::kDispatch:
      return "dispatch";
    case Op::kCombine:
      return "combine";
    case Op::kCombineBackward:
      return "combine_backward";
    case Op::kGather:
      return "gather";
    case Op::kPlan:
      return "plan";
    default:
      return "no call";
  }
}

std::string Describe(const CallSignature& call) {
  return std::string(Name(call.op)) + "(T=" + std::to_string(call.num_tokens) +
         ", K=" + std::to_string(call.top_k) + ", " + std::to_string(call.row_bytes) +
         " bytes a row, options " + std::to_string(call.options % 1000000) + ")";
}

const char* Describe(Phase phase) {
  switch (phase) {
    case Phase::kLock:
      return "for an earlier call on the same GPU to end, which itself waited for";
    case Phase::kConsumed:
      return "to finish the call before the last, by";
    case Phase::kReady:
      return "for the begin of the same call by";
    case Phase::kLanded:
      return "for partial sums from";
    case Phase::kReturned:
      return "for weight gradients from";
    case Phase::kFinish:
      return "for its tokens to be read by";
    default:
      return "for";
  }
}

constexpr char kRemedy[] =
    " Results of this group since then are poisoned (NaN, or all bits set). Call "
    "jax_moe_ep.reset() on all ranks to go on";

}  // namespace

std::string Describe(const Failure& failure, int num_ranks, int device) {
  std::string me = "rank " + std::to_string(failure.rank) + " of " + std::to_string(num_ranks) +
                   " (GPU " + std::to_string(device) + ")";
  std::string peer = "rank " + std::to_string(failure.peer);
  switch (failure.kind) {
    case FailureKind::kTimeout:
      return "jax_moe_ep: " + me + " gave up in " + Describe(failure.mine) + " after waiting " +
             std::to_string(failure.waited_ns / 1e9) + " s " + Describe(failure.phase) + " " +
             peer + ": expected call " + std::to_string(failure.expected) + ", seen " +
             std::to_string(failure.seen) + ". Does " + peer +
             " run, and make the same calls in the same order? EpConfig.timeout_s is the longest "
             "wait." +
             kRemedy;
    case FailureKind::kMismatch:
      return "jax_moe_ep: call " + std::to_string(failure.expected) + " of the group is " +
             Describe(failure.mine) + " on " + me + " but " + Describe(failure.theirs) + " on " +
             peer +
             ". All ranks must make the same calls in the same order; XLA may reorder two calls "
             "without a data dependency between them, so give them one." +
             kRemedy;
    case FailureKind::kPeer:
      return "jax_moe_ep: " + me + " stopped in " + Describe(failure.mine) + " because " + peer +
             " gave up; the error there says why." + kRemedy;
    default:
      return "";
  }
}

}  // namespace jax_moe_ep
