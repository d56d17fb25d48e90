#include "combine.h"

#include "handlers.h"
#include "rows_ffi.h"

namespace jax_moe_ep {
namespace {

constexpr char kCombine[] = "jax_moe_ep_combine";
constexpr char kBackward[] = "jax_moe_ep_combine_backward";

ffi::Error CombineInitializeImpl() { return ToFfiError(kCombine, LoadCombine()); }

// weights is [T, K], or [0, K] for a plain sum.
ffi::Error CombineImpl(cudaStream_t stream,
                       Slots slots,
                       Groups group_counts,
                       Groups group_sizes,
                       Groups group_starts,
                       ffi::AnyBuffer y,
                       TokenWeights weights,
                       ffi::Result<ffi::AnyBuffer> out,
                       int64_t alignment,
                       int64_t capacity,
                       bool zero_tail,
                       int64_t num_sms,
                       bool force_vector) {
  ++num_executions;
  RowsPlan plan;
  LaunchLimits limits;
  FloatType type;
  JAX_MOE_EP_RETURN_IF_ERROR(MakeRowsPlan(kCombine,
                                          slots,
                                          group_counts,
                                          group_sizes,
                                          group_starts,
                                          alignment,
                                          capacity,
                                          zero_tail,
                                          &plan));
  JAX_MOE_EP_RETURN_IF_ERROR(ToFfiError(kCombine, GetLaunchLimits(num_sms, force_vector, &limits)));
  JAX_MOE_EP_RETURN_IF_ERROR(GetFloatType(kCombine, y, &type));
  int64_t row_bytes = RowElements(y) * static_cast<int64_t>(ffi::ByteWidth(y.element_type()));
  JAX_MOE_EP_RETURN_IF_ERROR(CheckRows(kCombine, "y", y, plan.capacity, row_bytes));
  JAX_MOE_EP_RETURN_IF_ERROR(CheckRows(kCombine, "out", *out, plan.num_tokens, row_bytes));
  bool has_weights = weights.dimensions()[0] > 0;
  JAX_MOE_EP_RETURN_IF_ERROR(
      CheckDims(kCombine, "weights", weights, {has_weights ? plan.num_tokens : 0, plan.top_k}));
  return ToFfiError(kCombine,
                    LaunchCombine(plan,
                                  limits,
                                  type,
                                  y.untyped_data(),
                                  has_weights ? weights.typed_data() : nullptr,
                                  out->untyped_data(),
                                  row_bytes,
                                  stream));
}

ffi::Error CombineBackwardImpl(cudaStream_t stream,
                               Slots slots,
                               Groups group_counts,
                               Groups group_sizes,
                               Groups group_starts,
                               ffi::AnyBuffer dout,
                               ffi::AnyBuffer y,
                               TokenWeights weights,
                               ffi::Result<ffi::AnyBuffer> dy,
                               ffi::Result<TokenWeights> dweights,
                               int64_t alignment,
                               int64_t capacity,
                               bool zero_tail,
                               int64_t num_sms,
                               bool force_vector) {
  ++num_executions;
  RowsPlan plan;
  LaunchLimits limits;
  FloatType type;
  JAX_MOE_EP_RETURN_IF_ERROR(MakeRowsPlan(kBackward,
                                          slots,
                                          group_counts,
                                          group_sizes,
                                          group_starts,
                                          alignment,
                                          capacity,
                                          zero_tail,
                                          &plan));
  JAX_MOE_EP_RETURN_IF_ERROR(
      ToFfiError(kBackward, GetLaunchLimits(num_sms, force_vector, &limits)));
  JAX_MOE_EP_RETURN_IF_ERROR(GetFloatType(kBackward, y, &type));
  int64_t row_bytes = RowElements(y) * static_cast<int64_t>(ffi::ByteWidth(y.element_type()));
  JAX_MOE_EP_RETURN_IF_ERROR(CheckRows(kBackward, "y", y, plan.capacity, row_bytes));
  JAX_MOE_EP_RETURN_IF_ERROR(CheckRows(kBackward, "dout", dout, plan.num_tokens, row_bytes));
  JAX_MOE_EP_RETURN_IF_ERROR(CheckRows(kBackward, "dy", *dy, plan.capacity, row_bytes));
  if (dout.element_type() != y.element_type() || dy->element_type() != y.element_type()) {
    return ffi::Error::InvalidArgument(std::string(kBackward) +
                                       ": dout, y and dy must have one element type");
  }
  for (const TokenWeights& each : {weights, *dweights}) {
    JAX_MOE_EP_RETURN_IF_ERROR(
        CheckDims(kBackward, "weights", each, {plan.num_tokens, plan.top_k}));
  }
  return ToFfiError(kBackward,
                    LaunchCombineBackward(plan,
                                          limits,
                                          type,
                                          dout.untyped_data(),
                                          y.untyped_data(),
                                          weights.typed_data(),
                                          dy->untyped_data(),
                                          dweights->typed_data(),
                                          row_bytes,
                                          stream));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(CombineInitializeFfi,
                              CombineInitializeImpl,
                              ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    CombineFfi,
    CombineImpl,
    BindPlanAttributes(BindPlan(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>())
                           .Arg<ffi::AnyBuffer>()
                           .Arg<TokenWeights>()
                           .Ret<ffi::AnyBuffer>()),
    {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    CombineBackwardFfi,
    CombineBackwardImpl,
    BindPlanAttributes(BindPlan(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>())
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<TokenWeights>()
                           .Ret<ffi::AnyBuffer>()
                           .Ret<TokenWeights>()),
    {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_moe_ep
