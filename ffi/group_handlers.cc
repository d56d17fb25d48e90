// The ops that move rows, for groups of more than one rank.

#include "call_site.h"
#include "combine.h"
#include "dispatch.h"
#include "handlers.h"
#include "rows_ffi.h"

namespace jax_moe_ep {
namespace {

constexpr char kDispatch[] = "jax_moe_ep_group_dispatch";
constexpr char kCombine[] = "jax_moe_ep_group_combine";
constexpr char kBackward[] = "jax_moe_ep_group_combine_backward";

// SMs that a group's kernels leave free by default: for NCCL kernels of the same step, which a peer
// may wait for before it comes to the call.
constexpr int kFreeSms = 8;

// Fewer than these make combine cut its work into fewer pieces.
constexpr int kFewSms = 96;

using Owners = ffi::Buffer<ffi::S32, 2>;

// What every Execute needs: the plan, limits, and the view of its group.
struct Call {
  Arena* arena;
  RowsPlan plan;
  LaunchLimits limits;
  GroupView view;
  RegionLayout layout;
};

ffi::Error MakeLimits(const char* op, const GroupAttributes& attributes, LaunchLimits* limits) {
  JAX_MOE_EP_RETURN_IF_ERROR(
      ToFfiError(op, GetLaunchLimits(attributes.num_sms, attributes.force_vector, limits)));
  bool leaves_some = !limits->is_bounded && limits->num_sms > 2 * kFreeSms;
  if (leaves_some) limits->num_sms -= kFreeSms;
  return ffi::Error::Success();
}

ffi::Error MakeCall(const char* op,
                    CommunicatorContext& context,
                    CallSite* site,
                    const GroupAttributes& attributes,
                    const Slots& slots,
                    const Groups& group_counts,
                    const Groups& group_sizes,
                    const Groups& group_starts,
                    int64_t row_bytes,
                    Call* call) {
  ++num_executions;
  JAX_MOE_EP_RETURN_IF_ERROR(CheckDims(
      op, "slots", slots, {attributes.num_ranks * attributes.num_tokens, attributes.top_k}));
  if (row_bytes > attributes.row_bytes) {
    return ffi::Error::InvalidArgument(
        std::string(op) + ": rows have " + std::to_string(row_bytes) +
        " bytes, at most row_bytes=" + std::to_string(attributes.row_bytes) + " were announced");
  }
  JAX_MOE_EP_RETURN_IF_ERROR(MakeRowsPlan(op,
                                          slots,
                                          group_counts,
                                          group_sizes,
                                          group_starts,
                                          attributes.alignment,
                                          attributes.capacity,
                                          attributes.zero_tail,
                                          &call->plan,
                                          attributes.num_ranks));
  JAX_MOE_EP_RETURN_IF_ERROR(MakeLimits(op, attributes, &call->limits));
  auto arena = GetArena(context, attributes);
  if (!arena.has_value()) return arena.error();
  auto view = MakeView(**arena, site, attributes, row_bytes);
  if (!view.has_value()) return view.error();
  call->arena = *arena;
  call->view = *view;
  call->layout = attributes.Layout((*arena)->is_one_process(), row_bytes);
  return ffi::Error::Success();
}

// Lets peers read the argument in place, where they can. All ranks run one program, so that an
// error is one of all, before any of them launches the call.
ffi::Error Publish(Call* call,
                   const GroupAttributes& attributes,
                   const char* what,
                   const ffi::AnyBuffer& argument) {
  if (attributes.force_staged) return ffi::Error::Success();
  int64_t bytes = static_cast<int64_t>(argument.size_bytes());
  return call->arena->Publish(what, argument.untyped_data(), bytes, &call->view);
}

template <typename Buffer>
int64_t RowBytes(const Buffer& buffer) {
  return RowElements(buffer) * static_cast<int64_t>(ffi::ByteWidth(buffer.element_type()));
}

ffi::ErrorOr<std::unique_ptr<CallSite>> InstantiateImpl() { return std::make_unique<CallSite>(); }

ffi::Error PrepareImpl(CommunicatorContext context, GroupAttributes attributes) {
  return RequestGroup(context, attributes);
}

ffi::Error InitializeImpl(CommunicatorContext context,
                          CallSite* site,
                          ffi::ScratchAllocator allocator,
                          GroupAttributes attributes) {
  return InitializeGroup(context, site, allocator, attributes);
}

// One payload of a pytree after the other, each a call of its own.
ffi::Error DispatchImpl(cudaStream_t stream,
                        CommunicatorContext context,
                        CallSite* site,
                        Slots slots,
                        Groups group_counts,
                        Groups group_sizes,
                        Groups group_starts,
                        ffi::RemainingArgs x,
                        ffi::RemainingRets rows,
                        GroupAttributes attributes) {
  if (x.size() != rows.size()) {
    return ffi::Error::InvalidArgument(std::string(kDispatch) + ": x has " +
                                       std::to_string(x.size()) + " leaves, but rows has " +
                                       std::to_string(rows.size()));
  }
  for (size_t leaf = 0; leaf < x.size(); ++leaf) {
    auto in = x.get<ffi::AnyBuffer>(leaf);
    auto out = rows.get<ffi::AnyBuffer>(leaf);
    if (!in.has_value()) return in.error();
    if (!out.has_value()) return out.error();
    Call call;
    JAX_MOE_EP_RETURN_IF_ERROR(MakeCall(kDispatch,
                                        context,
                                        site,
                                        attributes,
                                        slots,
                                        group_counts,
                                        group_sizes,
                                        group_starts,
                                        RowBytes(*in),
                                        &call));
    JAX_MOE_EP_RETURN_IF_ERROR(CheckRows(kDispatch, "x", *in, call.plan.num_tokens, RowBytes(*in)));
    JAX_MOE_EP_RETURN_IF_ERROR(
        CheckRows(kDispatch, "rows", **out, call.plan.capacity, RowBytes(*in)));
    JAX_MOE_EP_RETURN_IF_ERROR(Publish(&call, attributes, "jax_moe_ep.dispatch: x", *in));
    JAX_MOE_EP_RETURN_IF_ERROR(ToFfiError(kDispatch,
                                          LaunchGroupDispatch(call.view,
                                                              call.layout,
                                                              call.plan,
                                                              call.limits,
                                                              in->untyped_data(),
                                                              (*out)->untyped_data(),
                                                              RowBytes(*in),
                                                              stream)));
  }
  return ffi::Error::Success();
}

// weights is [T, K], or [0, K] for a plain sum.
ffi::Error CombineImpl(cudaStream_t stream,
                       CommunicatorContext context,
                       CallSite* site,
                       Slots slots,
                       Groups group_counts,
                       Groups group_sizes,
                       Groups group_starts,
                       Owners owners,
                       ffi::AnyBuffer y,
                       TokenWeights weights,
                       ffi::Result<ffi::AnyBuffer> out,
                       GroupAttributes attributes) {
  Call call;
  JAX_MOE_EP_RETURN_IF_ERROR(MakeCall(kCombine,
                                      context,
                                      site,
                                      attributes,
                                      slots,
                                      group_counts,
                                      group_sizes,
                                      group_starts,
                                      RowBytes(y),
                                      &call));
  int64_t num_tokens = call.plan.num_tokens, top_k = call.plan.top_k;
  FloatType type;
  JAX_MOE_EP_RETURN_IF_ERROR(GetFloatType(kCombine, y, &type));
  JAX_MOE_EP_RETURN_IF_ERROR(CheckRows(kCombine, "y", y, call.plan.capacity, RowBytes(y)));
  JAX_MOE_EP_RETURN_IF_ERROR(CheckRows(kCombine, "out", *out, num_tokens, RowBytes(y)));
  JAX_MOE_EP_RETURN_IF_ERROR(CheckDims(kCombine, "owners", owners, {num_tokens, top_k}));
  JAX_MOE_EP_RETURN_IF_ERROR(
      CheckDims(kCombine, "weights", weights, {attributes.has_weights ? num_tokens : 0, top_k}));
  CombineArrays arrays{type,
                       owners.typed_data(),
                       y.untyped_data(),
                       attributes.has_weights ? weights.typed_data() : nullptr,
                       out->untyped_data(),
                       RowBytes(y),
                       attributes.num_sms < kFewSms};
  return ToFfiError(
      kCombine, LaunchGroupCombine(call.view, call.layout, call.plan, call.limits, arrays, stream));
}

ffi::Error CombineBackwardImpl(cudaStream_t stream,
                               CommunicatorContext context,
                               CallSite* site,
                               Slots slots,
                               Groups group_counts,
                               Groups group_sizes,
                               Groups group_starts,
                               Owners owners,
                               ffi::AnyBuffer dout,
                               ffi::AnyBuffer y,
                               TokenWeights weights,
                               ffi::Result<ffi::AnyBuffer> dy,
                               ffi::Result<TokenWeights> dweights,
                               GroupAttributes attributes) {
  Call call;
  JAX_MOE_EP_RETURN_IF_ERROR(MakeCall(kBackward,
                                      context,
                                      site,
                                      attributes,
                                      slots,
                                      group_counts,
                                      group_sizes,
                                      group_starts,
                                      RowBytes(y),
                                      &call));
  if (RowBytes(y) != attributes.row_bytes) {  // shorter ones may have more parts
    return ffi::Error::InvalidArgument(
        std::string(kBackward) + ": rows have " + std::to_string(RowBytes(y)) +
        " bytes, not row_bytes=" + std::to_string(attributes.row_bytes));
  }
  int64_t num_tokens = call.plan.num_tokens, top_k = call.plan.top_k;
  FloatType type;
  JAX_MOE_EP_RETURN_IF_ERROR(GetFloatType(kBackward, y, &type));
  JAX_MOE_EP_RETURN_IF_ERROR(CheckRows(kBackward, "y", y, call.plan.capacity, RowBytes(y)));
  JAX_MOE_EP_RETURN_IF_ERROR(CheckRows(kBackward, "dout", dout, num_tokens, RowBytes(y)));
  JAX_MOE_EP_RETURN_IF_ERROR(CheckRows(kBackward, "dy", *dy, call.plan.capacity, RowBytes(y)));
  if (dout.element_type() != y.element_type() || dy->element_type() != y.element_type()) {
    return ffi::Error::InvalidArgument(std::string(kBackward) +
                                       ": dout, y and dy must have one element type");
  }
  JAX_MOE_EP_RETURN_IF_ERROR(CheckDims(kBackward, "owners", owners, {num_tokens, top_k}));
  for (const TokenWeights& each : {weights, *dweights}) {
    JAX_MOE_EP_RETURN_IF_ERROR(CheckDims(kBackward, "weights", each, {num_tokens, top_k}));
  }
  JAX_MOE_EP_RETURN_IF_ERROR(
      Publish(&call, attributes, "jax_moe_ep.combine: the gradient of its result", dout));
  CombineBackwardArrays arrays{type,
                               owners.typed_data(),
                               dout.untyped_data(),
                               y.untyped_data(),
                               weights.typed_data(),
                               dy->untyped_data(),
                               dweights->typed_data(),
                               RowBytes(y)};
  return ToFfiError(
      kBackward,
      LaunchGroupCombineBackward(call.view, call.layout, call.plan, call.limits, arrays, stream));
}

auto BindGroup() {
  return BindPlan(ffi::Ffi::Bind()
                      .Ctx<ffi::PlatformStream<cudaStream_t>>()
                      .Ctx<ffi::Extension<Collectives>>()
                      .Ctx<ffi::State<CallSite>>());
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupInstantiateFfi,
                              InstantiateImpl,
                              ffi::Ffi::Bind<ffi::ExecutionStage::kInstantiate>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupPrepareFfi,
                              PrepareImpl,
                              ffi::Ffi::Bind<ffi::ExecutionStage::kPrepare>()
                                  .Ctx<ffi::Extension<Collectives>>()
                                  .Attrs<GroupAttributes>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupInitializeFfi,
                              InitializeImpl,
                              ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>()
                                  .Ctx<ffi::Extension<Collectives>>()
                                  .Ctx<ffi::State<CallSite>>()
                                  .Ctx<ffi::ScratchAllocator>()
                                  .Attrs<GroupAttributes>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupDispatchFfi,
                              DispatchImpl,
                              BindGroup().RemainingArgs().RemainingRets().Attrs<GroupAttributes>(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupCombineFfi,
                              CombineImpl,
                              BindGroup()
                                  .Arg<Owners>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<TokenWeights>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attrs<GroupAttributes>(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupCombineBackwardFfi,
                              CombineBackwardImpl,
                              BindGroup()
                                  .Arg<Owners>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<TokenWeights>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<TokenWeights>()
                                  .Attrs<GroupAttributes>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_moe_ep
