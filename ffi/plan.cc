#include "plan.h"

#include "handlers.h"
#include "plan_ffi.h"

namespace jax_moe_ep {
namespace {

constexpr char kOp[] = "jax_moe_ep_plan";

ffi::Error PlanInitializeImpl() { return ToFfiError(kOp, LoadPlan()); }

ffi::Error PlanImpl(cudaStream_t stream,
                    PlanIds ids,
                    PlanPriority priority,
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
                    int64_t num_ranks,
                    int64_t rank,
                    int64_t num_experts,
                    int64_t alignment,
                    int64_t capacity,
                    int64_t expert_limit,
                    bool by_priority,
                    bool block_for_empty,
                    int64_t num_sms,
                    bool force_large) {
  ++num_executions;
  PlanOptions options =
      MakePlanOptions(alignment, capacity, expert_limit, block_for_empty, num_sms, force_large);
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
  JAX_MOE_EP_RETURN_IF_ERROR(MakePlanCall(
      kOp, num_ranks, rank, num_experts, by_priority, options, ids, priority, results, &call));
  return ToFfiError(kOp, LaunchPlan(call.shape, call.options, call.arrays, stream));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(PlanInitializeFfi,
                              PlanInitializeImpl,
                              ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(PlanFfi,
                              PlanImpl,
                              BindPlanResults(ffi::Ffi::Bind()
                                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                                  .Arg<PlanIds>()
                                                  .Arg<PlanPriority>())
                                  .Attr<int64_t>("num_ranks")
                                  .Attr<int64_t>("rank")
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
