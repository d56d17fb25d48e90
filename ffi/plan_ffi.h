// What the handlers of plan share: its results, options and checks.

#ifndef JAX_MOE_EP_PLAN_FFI_H_
#define JAX_MOE_EP_PLAN_FFI_H_

#include <string>
#include <utility>

#include "checks.h"
#include "plan.h"

namespace jax_moe_ep {

using PlanIds = ffi::Buffer<ffi::S32, 2>;
using PlanPriority = ffi::Buffer<ffi::F32, 2>;
using PlanScalar = ffi::Buffer<ffi::S32, 0>;
using PlanVector = ffi::Buffer<ffi::S32, 1>;
using PlanMatrix = ffi::Buffer<ffi::S32, 2>;

struct PlanResults {
  ffi::Result<PlanMatrix> slots;
  ffi::Result<PlanMatrix> owners;
  ffi::Result<PlanVector> group_counts;
  ffi::Result<PlanVector> group_sizes;
  ffi::Result<PlanVector> group_starts;
  ffi::Result<PlanMatrix> source_counts;
  ffi::Result<PlanScalar> num_assignments;
  ffi::Result<PlanScalar> num_dropped;
  ffi::Result<PlanScalar> required_rows;
  ffi::Result<PlanVector> scratch;
};

template <typename Binding>
auto BindPlanResults(Binding binding) {
  return std::move(binding)
      .template Ret<PlanMatrix>()
      .template Ret<PlanMatrix>()
      .template Ret<PlanVector>()
      .template Ret<PlanVector>()
      .template Ret<PlanVector>()
      .template Ret<PlanMatrix>()
      .template Ret<PlanScalar>()
      .template Ret<PlanScalar>()
      .template Ret<PlanScalar>()
      .template Ret<PlanVector>();
}

// From attributes, which are 64 bits wide; Python has checked that they fit.
inline PlanOptions MakePlanOptions(int64_t alignment,
                                   int64_t capacity,
                                   int64_t expert_limit,
                                   bool block_for_empty,
                                   int64_t num_sms,
                                   bool force_large) {
  return {static_cast<int32_t>(alignment),
          static_cast<int32_t>(capacity),
          static_cast<int32_t>(expert_limit),
          block_for_empty,
          static_cast<int32_t>(num_sms),
          force_large};
}

struct PlanCall {
  PlanShape shape;
  PlanOptions options;
  PlanArrays arrays;
};

// ids and priority: of all ranks. Checks all shapes.
inline ffi::Error MakePlanCall(const char* op,
                               int64_t num_ranks,
                               int64_t rank,
                               int64_t num_experts,
                               bool by_priority,
                               const PlanOptions& options,
                               const PlanIds& ids,
                               const PlanPriority& priority,
                               const PlanResults& results,
                               PlanCall* call) {
  if (num_experts < 1 || num_experts > kMaxExperts || num_ranks < 1 || num_experts % num_ranks ||
      rank < 0 || rank >= num_ranks) {
    return ffi::Error::InvalidArgument(
        std::string(op) + ": num_experts must be a multiple of num_ranks and at most " +
        std::to_string(kMaxExperts) +
        ", and rank one of them, got num_experts=" + std::to_string(num_experts) +
        ", num_ranks=" + std::to_string(num_ranks) + ", rank=" + std::to_string(rank));
  }
  int64_t num_local = num_experts / num_ranks;
  int64_t num_rows = ids.dimensions()[0], top_k = ids.dimensions()[1];
  if (num_rows % num_ranks || ids.element_count() > INT32_MAX || ids.element_count() == 0) {
    return ffi::Error::InvalidArgument(
        std::string(op) + ": ids must have shape [R*T, K] with 1 to 2^31 - 1 elements, got " +
        DimsToString(ids.dimensions().begin(), 2) + " for " + std::to_string(num_ranks) + " ranks");
  }
  call->shape = {static_cast<int>(num_ranks),
                 static_cast<int>(num_experts),
                 static_cast<int32_t>(ids.element_count() / num_ranks),
                 by_priority,
                 static_cast<int>(rank)};
  call->options = options;
  JAX_MOE_EP_RETURN_IF_ERROR(
      CheckDims(op, "priority", priority, {by_priority ? num_rows : 0, top_k}));
  JAX_MOE_EP_RETURN_IF_ERROR(CheckDims(op, "slots", *results.slots, {num_rows, top_k}));
  JAX_MOE_EP_RETURN_IF_ERROR(
      CheckDims(op, "owners", *results.owners, {num_rows / num_ranks, top_k}));
  JAX_MOE_EP_RETURN_IF_ERROR(CheckDims(op, "group_counts", *results.group_counts, {num_local}));
  JAX_MOE_EP_RETURN_IF_ERROR(CheckDims(op, "group_sizes", *results.group_sizes, {num_local}));
  JAX_MOE_EP_RETURN_IF_ERROR(CheckDims(op, "group_starts", *results.group_starts, {num_local}));
  JAX_MOE_EP_RETURN_IF_ERROR(
      CheckDims(op, "source_counts", *results.source_counts, {num_ranks, num_local}));
  JAX_MOE_EP_RETURN_IF_ERROR(
      CheckDims(op, "scratch", *results.scratch, {PlanScratchSize(call->shape)}));
  auto data = [](auto result) { return (*result).typed_data(); };
  call->arrays = {ids.typed_data(),
                  by_priority ? priority.typed_data() : nullptr,
                  data(results.slots),
                  data(results.owners),
                  data(results.group_counts),
                  data(results.group_sizes),
                  data(results.group_starts),
                  data(results.source_counts),
                  data(results.num_assignments),
                  data(results.num_dropped),
                  data(results.required_rows),
                  data(results.scratch)};
  return ffi::Error::Success();
}

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_PLAN_FFI_H_
