#include "plan_group.h"

#include "call_site.h"
#include "handlers.h"
#include "plan_ffi.h"

namespace jax_moe_ep {

// What plan needs beside.
struct GroupPlanAttributes : GroupAttributes {
  int64_t num_experts;
  int64_t expert_limit;
  bool by_priority;
  bool block_for_empty;
  bool force_large;
};

}  // namespace jax_moe_ep

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(::jax_moe_ep::GroupPlanAttributes,
                                      JAX_MOE_EP_GROUP_MEMBERS,
                                      ::xla::ffi::StructMember<int64_t>("num_experts"),
                                      ::xla::ffi::StructMember<int64_t>("expert_limit"),
                                      ::xla::ffi::StructMember<bool>("by_priority"),
                                      ::xla::ffi::StructMember<bool>("block_for_empty"),
                                      ::xla::ffi::StructMember<bool>("force_large"));

namespace jax_moe_ep {
namespace {

constexpr char kOp[] = "jax_moe_ep_group_plan";

ffi::Error PrepareImpl(CommunicatorContext context, GroupPlanAttributes attributes) {
  return RequestGroup(context, attributes);
}

ffi::Error InitializeImpl(CommunicatorContext context,
                          CallSite* site,
                          ffi::ScratchAllocator allocator,
                          GroupPlanAttributes attributes) {
  return InitializeGroup(context, site, allocator, attributes);
}

// ids and priority of this rank; those of all ranks, undefined if they are few, then the plan.
ffi::Error PlanImpl(cudaStream_t stream,
                    CommunicatorContext context,
                    CallSite* site,
                    PlanIds ids,
                    PlanPriority priority,
                    ffi::Result<PlanIds> all_ids,
                    ffi::Result<PlanPriority> all_priority,
                    ffi::Result<PlanMatrix> slots,
                    ffi::Result<PlanMatrix> owners,
                    ffi::Result<PlanVector> group_counts,
                    ffi::Result<PlanVector> group_sizes,
                    ffi::Result<PlanVector> group_starts,
                    ffi::Result<PlanMatrix> source_counts,
                    ffi::Result<PlanScalar> num_assignments,
                    ffi::Result<PlanScalar> num_dropped,
                    ffi::Result<PlanScalar> required_rows,
                    ffi::Result<PlanVector> scratch,
                    GroupPlanAttributes attributes) {
  ++num_executions;
  int64_t num_tokens = attributes.num_tokens, top_k = attributes.top_k;
  int64_t num_priority = attributes.by_priority ? num_tokens : 0;
  JAX_MOE_EP_RETURN_IF_ERROR(CheckDims(kOp, "ids", ids, {num_tokens, top_k}));
  JAX_MOE_EP_RETURN_IF_ERROR(CheckDims(kOp, "priority", priority, {num_priority, top_k}));
  JAX_MOE_EP_RETURN_IF_ERROR(
      CheckDims(kOp, "all_ids", *all_ids, {attributes.num_ranks * num_tokens, top_k}));
  int64_t row_bytes =
      top_k * static_cast<int64_t>(sizeof(int32_t)) * (attributes.by_priority ? 2 : 1);
  if (attributes.row_bytes != row_bytes) {
    return ffi::Error::InvalidArgument(std::string(kOp) +
                                       ": expected row_bytes=" + std::to_string(row_bytes) +
                                       ", got " + std::to_string(attributes.row_bytes));
  }
  auto arena = GetArena(context, attributes);
  if (!arena.has_value()) return arena.error();
  auto view = MakeView(**arena, site, attributes, attributes.row_bytes);
  if (!view.has_value()) return view.error();
  PlanOptions options = MakePlanOptions(attributes.alignment,
                                        attributes.capacity,
                                        attributes.expert_limit,
                                        attributes.block_for_empty,
                                        attributes.num_sms,
                                        attributes.force_large);
  PlanResults results{slots,
                      owners,
                      group_counts,
                      group_sizes,
                      group_starts,
                      source_counts,
                      num_assignments,
                      num_dropped,
                      required_rows,
                      scratch};
  PlanCall call;
  JAX_MOE_EP_RETURN_IF_ERROR(MakePlanCall(kOp,
                                          attributes.num_ranks,
                                          view->rank,
                                          attributes.num_experts,
                                          attributes.by_priority,
                                          options,
                                          *all_ids,
                                          *all_priority,
                                          results,
                                          &call));
  GatherArrays gathered{attributes.by_priority ? 2 : 1,
                        static_cast<int64_t>(ids.size_bytes()),
                        {ids.untyped_data(), priority.untyped_data()},
                        {all_ids->untyped_data(), all_priority->untyped_data()}};
  return ToFfiError(kOp,
                    LaunchGroupPlan(*view,
                                    attributes.Layout((*arena)->is_one_process()),
                                    gathered,
                                    call.shape,
                                    call.options,
                                    call.arrays,
                                    stream));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupPlanPrepareFfi,
                              PrepareImpl,
                              ffi::Ffi::Bind<ffi::ExecutionStage::kPrepare>()
                                  .Ctx<ffi::Extension<Collectives>>()
                                  .Attrs<GroupPlanAttributes>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupPlanInitializeFfi,
                              InitializeImpl,
                              ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>()
                                  .Ctx<ffi::Extension<Collectives>>()
                                  .Ctx<ffi::State<CallSite>>()
                                  .Ctx<ffi::ScratchAllocator>()
                                  .Attrs<GroupPlanAttributes>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupPlanFfi,
                              PlanImpl,
                              BindPlanResults(ffi::Ffi::Bind()
                                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                                  .Ctx<ffi::Extension<Collectives>>()
                                                  .Ctx<ffi::State<CallSite>>()
                                                  .Arg<PlanIds>()
                                                  .Arg<PlanPriority>()
                                                  .Ret<PlanIds>()
                                                  .Ret<PlanPriority>())
                                  .Attrs<GroupPlanAttributes>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_moe_ep
