#include "dispatch.h"

#include "handlers.h"
#include "rows_ffi.h"

namespace jax_moe_ep {
namespace {

constexpr char kOp[] = "jax_moe_ep_dispatch";

ffi::Error DispatchInitializeImpl() { return ToFfiError(kOp, LoadDispatch()); }

// One payload of a pytree after the other.
ffi::Error DispatchImpl(cudaStream_t stream,
                        Slots slots,
                        Groups group_counts,
                        Groups group_sizes,
                        Groups group_starts,
                        ffi::RemainingArgs x,
                        ffi::RemainingRets rows,
                        int64_t alignment,
                        int64_t capacity,
                        bool zero_tail,
                        int64_t num_sms,
                        bool force_vector) {
  ++num_executions;
  RowsPlan plan;
  LaunchLimits limits;
  JAX_MOE_EP_RETURN_IF_ERROR(MakeRowsPlan(
      kOp, slots, group_counts, group_sizes, group_starts, alignment, capacity, zero_tail, &plan));
  JAX_MOE_EP_RETURN_IF_ERROR(ToFfiError(kOp, GetLaunchLimits(num_sms, force_vector, &limits)));
  if (x.size() != rows.size()) {
    return ffi::Error::InvalidArgument(std::string(kOp) + ": x has " + std::to_string(x.size()) +
                                       " leaves, but rows has " + std::to_string(rows.size()));
  }
  for (size_t leaf = 0; leaf < x.size(); ++leaf) {
    auto in = x.get<ffi::AnyBuffer>(leaf);
    auto out = rows.get<ffi::AnyBuffer>(leaf);
    if (!in.has_value()) return in.error();
    if (!out.has_value()) return out.error();
    int64_t row_bytes = RowElements(*in) * static_cast<int64_t>(ffi::ByteWidth(in->element_type()));
    JAX_MOE_EP_RETURN_IF_ERROR(CheckRows(kOp, "x", *in, plan.num_tokens, row_bytes));
    JAX_MOE_EP_RETURN_IF_ERROR(CheckRows(kOp, "rows", **out, plan.capacity, row_bytes));
    JAX_MOE_EP_RETURN_IF_ERROR(ToFfiError(
        kOp,
        LaunchDispatch(
            plan, limits, in->untyped_data(), (*out)->untyped_data(), row_bytes, stream)));
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DispatchInitializeFfi,
                              DispatchInitializeImpl,
                              ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DispatchFfi,
    DispatchImpl,
    BindPlanAttributes(BindPlan(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>())
                           .RemainingArgs()
                           .RemainingRets()),
    {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_moe_ep
