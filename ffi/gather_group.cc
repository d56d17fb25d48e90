#include "gather_group.h"

#include "call_site.h"
#include "handlers.h"
#include "rows.h"

namespace jax_moe_ep {
namespace {

constexpr char kOp[] = "jax_moe_ep_group_gather";

// out has x of all ranks.
ffi::Error GatherImpl(cudaStream_t stream,
                      CommunicatorContext context,
                      CallSite* site,
                      ffi::AnyBuffer x,
                      ffi::Result<ffi::AnyBuffer> out,
                      GroupAttributes attributes) {
  ++num_executions;
  int64_t bytes = attributes.num_tokens * attributes.row_bytes;
  int64_t given = x.size_bytes(), result = out->size_bytes();
  if (given != bytes || result != bytes * attributes.num_ranks) {
    return ffi::Error::InvalidArgument(std::string(kOp) + ": x must have " + std::to_string(bytes) +
                                       " bytes and its result " +
                                       std::to_string(bytes * attributes.num_ranks) + ", got " +
                                       std::to_string(given) + " and " + std::to_string(result));
  }
  LaunchLimits limits;
  JAX_MOE_EP_RETURN_IF_ERROR(
      ToFfiError(kOp, GetLaunchLimits(attributes.num_sms, attributes.force_vector, &limits)));
  auto arena = GetArena(context, attributes);
  if (!arena.has_value()) return arena.error();
  auto view = MakeView(**arena, site, attributes, attributes.row_bytes);
  if (!view.has_value()) return view.error();
  GatherArrays arrays{1, bytes, {x.untyped_data()}, {out->untyped_data()}};
  RegionLayout layout = attributes.Layout((*arena)->is_one_process());
  return ToFfiError(kOp, LaunchGroupGather(*view, layout, arrays, limits.num_sms, stream));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupGatherFfi,
                              GatherImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::Extension<Collectives>>()
                                  .Ctx<ffi::State<CallSite>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attrs<GroupAttributes>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_moe_ep
