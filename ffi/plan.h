// plan: from the gathered expert ids to the receive row of every assignment.

#ifndef JAX_MOE_EP_PLAN_H_
#define JAX_MOE_EP_PLAN_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_moe_ep {

// The most experts of a group: one block lays out the experts of one rank.
inline constexpr int kMaxExperts = 4096;

// What is known when the call is traced. R ranks, E experts, L = E / R, N = R*T*K assignments in
// the order (source rank, token, k).
struct PlanShape {
  int num_ranks;
  int num_experts;
  int32_t assignments_per_rank;  // T*K
  bool by_priority;              // which rows stay: the first by position, or by priority
  int rank;                      // whose plan
};

struct PlanOptions {
  int32_t alignment;
  int32_t capacity;      // C
  int32_t expert_limit;  // the most rows an expert keeps
  bool block_for_empty;  // an expert without rows takes one block of `alignment`
  int32_t num_sms;       // the most blocks of a launch
  bool force_large;      // also for few assignments the kernels of many: for tests
};

// Device pointers. An id outside [0, E) is "no expert".
struct PlanArrays {
  const int32_t* ids;        // [N]
  const float* priority;     // [N], or null by position
  int32_t* slots;            // [N]
  int32_t* owners;           // [T*K]
  int32_t* group_counts;     // [L]
  int32_t* group_sizes;      // [L]
  int32_t* group_starts;     // [L]
  int32_t* source_counts;    // [R, L]
  int32_t* num_assignments;  // []
  int32_t* num_dropped;      // []
  int32_t* required_rows;    // []
  int32_t* scratch;          // [PlanScratchSize(shape)], any content
};

// int32 words of scratch.
int64_t PlanScratchSize(const PlanShape& shape);

// Loads the kernels on the current device: loading one lazily can deadlock against a kernel that
// waits for a peer, and is not allowed while a CUDA graph is captured.
cudaError_t LoadPlan();

cudaError_t LaunchPlan(const PlanShape& shape,
                       const PlanOptions& options,
                       const PlanArrays& arrays,
                       cudaStream_t stream);

// The same by one block, for plans by position whose counters fit into its shared memory: up to
// 8,192 assignments of 256 experts on 1, 2, 4, ... 32 ranks, say. Needs no scratch.
bool IsSmallPlan(const PlanShape& shape);
cudaError_t LoadSmallPlan();
cudaError_t LaunchSmallPlan(const PlanShape& shape,
                            const PlanOptions& options,
                            const PlanArrays& arrays,
                            cudaStream_t stream);

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_PLAN_H_
