#include "plan.h"

#include "checks.h"
#include "handlers.h"

namespace jax_moe_ep {
namespace {

constexpr char kOp[] = "jax_moe_ep_plan";

using Ids = ffi::Buffer<ffi::S32, 2>;
using Priority = ffi::Buffer<ffi::F32, 2>;
using Scalar = ffi::Buffer<ffi::S32, 0>;
using Vector = ffi::Buffer<ffi::S32, 1>;
using Matrix = ffi::Buffer<ffi::S32, 2>;

ffi::Error PlanInitializeImpl() { return ToFfiError(kOp, LoadPlan()); }

ffi::Error PlanImpl(cudaStream_t stream,
                    Ids ids,
                    Priority priority,
                    Scalar rank,
                    ffi::Result<Matrix> slots,
                    ffi::Result<Matrix> owners,
                    ffi::Result<Vector> group_counts,
                    ffi::Result<Vector> group_sizes,
                    ffi::Result<Vector> group_starts,
                    ffi::Result<Matrix> source_counts,
                    ffi::Result<Scalar> num_assignments,
                    ffi::Result<Scalar> num_dropped,
                    ffi::Result<Scalar> required_rows,
                    ffi::Result<Vector> scratch,
                    int64_t num_ranks,
                    int64_t num_experts,
                    int64_t alignment,
                    int64_t capacity,
                    int64_t expert_limit,
                    bool by_priority,
                    bool block_for_empty,
                    int64_t num_sms,
                    bool force_large) {
  ++num_executions;
  if (num_experts < 1 || num_experts > kMaxExperts || num_ranks < 1 || num_experts % num_ranks) {
    return ffi::Error::InvalidArgument(
        std::string(kOp) + ": num_experts must be a multiple of num_ranks and at most " +
        std::to_string(kMaxExperts) + ", got num_experts=" + std::to_string(num_experts) +
        ", num_ranks=" + std::to_string(num_ranks));
  }
  int64_t num_local = num_experts / num_ranks;
  int64_t num_rows = ids.dimensions()[0], top_k = ids.dimensions()[1];
  if (num_rows % num_ranks || ids.element_count() > INT32_MAX || ids.element_count() == 0) {
    return ffi::Error::InvalidArgument(
        std::string(kOp) + ": ids must have shape [R*T, K] with 1 to 2^31 - 1 elements, got " +
        DimsToString(ids.dimensions().begin(), 2) + " for " + std::to_string(num_ranks) + " ranks");
  }
  PlanShape shape{static_cast<int>(num_ranks),
                  static_cast<int>(num_experts),
                  static_cast<int32_t>(ids.element_count() / num_ranks),
                  by_priority};
  JAX_MOE_EP_RETURN_IF_ERROR(
      CheckDims(kOp, "priority", priority, {by_priority ? num_rows : 0, top_k}));
  JAX_MOE_EP_RETURN_IF_ERROR(CheckDims(kOp, "slots", *slots, {num_rows, top_k}));
  JAX_MOE_EP_RETURN_IF_ERROR(CheckDims(kOp, "owners", *owners, {num_rows / num_ranks, top_k}));
  JAX_MOE_EP_RETURN_IF_ERROR(CheckDims(kOp, "group_counts", *group_counts, {num_local}));
  JAX_MOE_EP_RETURN_IF_ERROR(CheckDims(kOp, "group_sizes", *group_sizes, {num_local}));
  JAX_MOE_EP_RETURN_IF_ERROR(CheckDims(kOp, "group_starts", *group_starts, {num_local}));
  JAX_MOE_EP_RETURN_IF_ERROR(
      CheckDims(kOp, "source_counts", *source_counts, {num_ranks, num_local}));
  JAX_MOE_EP_RETURN_IF_ERROR(CheckDims(kOp, "scratch", *scratch, {PlanScratchSize(shape)}));

  PlanOptions options{static_cast<int32_t>(alignment),
                      static_cast<int32_t>(capacity),
                      static_cast<int32_t>(expert_limit),
                      block_for_empty,
                      static_cast<int32_t>(num_sms),
                      force_large};
  PlanArrays arrays{ids.typed_data(),
                    by_priority ? priority.typed_data() : nullptr,
                    rank.typed_data(),
                    slots->typed_data(),
                    owners->typed_data(),
                    group_counts->typed_data(),
                    group_sizes->typed_data(),
                    group_starts->typed_data(),
                    source_counts->typed_data(),
                    num_assignments->typed_data(),
                    num_dropped->typed_data(),
                    required_rows->typed_data(),
                    scratch->typed_data()};
  return ToFfiError(kOp, LaunchPlan(shape, options, arrays, stream));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(PlanInitializeFfi,
                              PlanInitializeImpl,
                              ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(PlanFfi,
                              PlanImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<Ids>()
                                  .Arg<Priority>()
                                  .Arg<Scalar>()
                                  .Ret<Matrix>()
                                  .Ret<Matrix>()
                                  .Ret<Vector>()
                                  .Ret<Vector>()
                                  .Ret<Vector>()
                                  .Ret<Matrix>()
                                  .Ret<Scalar>()
                                  .Ret<Scalar>()
                                  .Ret<Scalar>()
                                  .Ret<Vector>()
                                  .Attr<int64_t>("num_ranks")
                                  .Attr<int64_t>("num_experts")
                                  .Attr<int64_t>("alignment")
                                  .Attr<int64_t>("capacity")
                                  .Attr<int64_t>("expert_limit")
                                  .Attr<bool>("by_priority")
                                  .Attr<bool>("block_for_empty")
                                  .Attr<int64_t>("num_sms")
                                  .Attr<bool>("force_large"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_moe_ep
