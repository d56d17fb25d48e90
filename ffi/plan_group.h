// plan of a group: the expert ids of all ranks, gathered, and the plan of this rank.

#ifndef JAX_MOE_EP_PLAN_GROUP_H_
#define JAX_MOE_EP_PLAN_GROUP_H_

#include "gather_group.h"
#include "plan.h"

namespace jax_moe_ep {

// With those of LoadPlan and LoadGroupGather.
cudaError_t LoadGroupPlan();

// gathered: ids, with priorities by priority; their results, which plan of few leaves unwritten,
// are the ids and priorities of the plan's arrays.
cudaError_t LaunchGroupPlan(const GroupView& group,
                            const RegionLayout& layout,
                            const GatherArrays& gathered,
                            const PlanShape& shape,
                            const PlanOptions& options,
                            const PlanArrays& arrays,
                            cudaStream_t stream);

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_PLAN_GROUP_H_
