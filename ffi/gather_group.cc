#include "gather_group.h"

#include "call_site.h"
#include "handlers.h"
#include "rows.h"

namespace jax_moe_ep {
namespace {

constexpr char kOp[] = "jax_moe_ep_group_gather";

std::string Bytes(int64_t bytes) { return std::to_string(bytes) + " bytes"; }

// The arrays of a call: as many as results, all x of one size, each result R times that.
ffi::Error MakeArrays(ffi::RemainingArgs x,
                      ffi::RemainingRets out,
                      const GroupAttributes& attributes,
                      GatherArrays* arrays) {
  int64_t count = static_cast<int64_t>(x.size());
  if (count < 1 || count > kMaxGathered || x.size() != out.size()) {
    return ffi::Error::InvalidArgument(std::string(kOp) + ": expected 1 to " +
                                       std::to_string(kMaxGathered) +
                                       " arrays and as many results, got " + std::to_string(count) +
                                       " and " + std::to_string(out.size()));
  }
  arrays->count = static_cast<int>(count);
  arrays->bytes = attributes.num_tokens * attributes.row_bytes / count;
  for (int64_t i = 0; i < count; ++i) {
    auto from = x.get<ffi::AnyBuffer>(i);
    auto to = out.get<ffi::AnyBuffer>(i);
    if (!from.has_value()) return from.error();
    if (!to.has_value()) return to.error();
    int64_t got = from->size_bytes(), result = (*to)->size_bytes();
    if (got * count != attributes.num_tokens * attributes.row_bytes ||
        result != got * attributes.num_ranks) {
      return ffi::Error::InvalidArgument(
          std::string(kOp) + ": each of " + std::to_string(count) + " arrays must have " +
          Bytes(arrays->bytes) + " and its result " + Bytes(arrays->bytes * attributes.num_ranks) +
          ", got " + Bytes(got) + " and " + Bytes(result));
    }
    arrays->x[i] = from->untyped_data();
    arrays->out[i] = (*to)->untyped_data();
  }
  return ffi::Error::Success();
}

ffi::Error GatherImpl(cudaStream_t stream,
                      CommunicatorContext context,
                      CallSite* site,
                      ffi::RemainingArgs x,
                      ffi::RemainingRets out,
                      GroupAttributes attributes) {
  ++num_executions;
  GatherArrays arrays{};
  JAX_MOE_EP_RETURN_IF_ERROR(MakeArrays(x, out, attributes, &arrays));
  LaunchLimits limits;
  JAX_MOE_EP_RETURN_IF_ERROR(
      ToFfiError(kOp, GetLaunchLimits(attributes.num_sms, attributes.force_vector, &limits)));
  auto arena = GetArena(context, attributes);
  if (!arena.has_value()) return arena.error();
  auto view = MakeView(**arena, site, attributes, attributes.row_bytes);
  if (!view.has_value()) return view.error();
  RegionLayout layout = attributes.Layout(view->is_one_process);
  return ToFfiError(kOp, LaunchGroupGather(*view, layout, arrays, limits.num_sms, stream));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupGatherFfi,
                              GatherImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::Extension<Collectives>>()
                                  .Ctx<ffi::State<CallSite>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs<GroupAttributes>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_moe_ep
