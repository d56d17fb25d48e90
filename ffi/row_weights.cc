#include "row_weights.h"

#include "handlers.h"
#include "rows_ffi.h"

namespace jax_moe_ep {
namespace {

constexpr char kForward[] = "jax_moe_ep_row_weights";
constexpr char kBackward[] = "jax_moe_ep_row_weights_backward";

ffi::Error RowWeightsInitializeImpl() { return ToFfiError(kForward, LoadRowWeights()); }

// Checks weights [T, K] and row_weights [C], of one floating type of 2 or 4 bytes.
ffi::Error CheckBoth(const char* op,
                     const RowsPlan& plan,
                     const ffi::AnyBuffer& weights,
                     const ffi::AnyBuffer& row_weights) {
  JAX_MOE_EP_RETURN_IF_ERROR(
      CheckDims(op, "weights", weights, {plan.num_tokens, int64_t{plan.top_k}}));
  JAX_MOE_EP_RETURN_IF_ERROR(CheckDims(op, "row_weights", row_weights, {plan.capacity}));
  size_t width = ffi::ByteWidth(weights.element_type());
  if (weights.element_type() != row_weights.element_type() || (width != 2 && width != 4)) {
    return ffi::Error::InvalidArgument(
        std::string(op) + ": weights and row_weights must have one type of 2 or 4 bytes");
  }
  return ffi::Error::Success();
}

ffi::Error RowWeightsImpl(cudaStream_t stream,
                          Slots slots,
                          Groups group_counts,
                          Groups group_sizes,
                          Groups group_starts,
                          ffi::AnyBuffer weights,
                          ffi::Result<ffi::AnyBuffer> row_weights,
                          int64_t alignment,
                          int64_t capacity,
                          bool zero_tail,
                          int64_t num_sms,
                          bool force_vector) {
  ++num_executions;
  RowsPlan plan;
  LaunchLimits limits;
  JAX_MOE_EP_RETURN_IF_ERROR(MakeRowsPlan(kForward,
                                          slots,
                                          group_counts,
                                          group_sizes,
                                          group_starts,
                                          alignment,
                                          capacity,
                                          zero_tail,
                                          &plan));
  JAX_MOE_EP_RETURN_IF_ERROR(ToFfiError(kForward, GetLaunchLimits(num_sms, force_vector, &limits)));
  JAX_MOE_EP_RETURN_IF_ERROR(CheckBoth(kForward, plan, weights, *row_weights));
  int width = static_cast<int>(ffi::ByteWidth(weights.element_type()));
  return ToFfiError(
      kForward,
      LaunchRowWeights(
          plan, limits, weights.untyped_data(), row_weights->untyped_data(), width, stream));
}

ffi::Error RowWeightsBackwardImpl(cudaStream_t stream,
                                  Slots slots,
                                  Groups group_counts,
                                  Groups group_sizes,
                                  Groups group_starts,
                                  ffi::AnyBuffer drow,
                                  ffi::Result<ffi::AnyBuffer> dweights,
                                  int64_t alignment,
                                  int64_t capacity,
                                  bool zero_tail,
                                  int64_t num_sms,
                                  bool force_vector) {
  ++num_executions;
  RowsPlan plan;
  LaunchLimits limits;
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
  JAX_MOE_EP_RETURN_IF_ERROR(CheckBoth(kBackward, plan, *dweights, drow));
  int width = static_cast<int>(ffi::ByteWidth(drow.element_type()));
  return ToFfiError(
      kBackward,
      LaunchRowWeightsBackward(
          plan, limits, drow.untyped_data(), dweights->untyped_data(), width, stream));
}

auto BindOneArray() {
  return BindPlanAttributes(BindPlan(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>())
                                .Arg<ffi::AnyBuffer>()
                                .Ret<ffi::AnyBuffer>());
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(RowWeightsInitializeFfi,
                              RowWeightsInitializeImpl,
                              ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(RowWeightsFfi,
                              RowWeightsImpl,
                              BindOneArray(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(RowWeightsBackwardFfi,
                              RowWeightsBackwardImpl,
                              BindOneArray(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_moe_ep
