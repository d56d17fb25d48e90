// The FFI handlers that module.cc registers. For each op one that loads its kernels and one that
// launches them; in a group four stages, the first three for all ops but plan, which has more
// attributes.

#ifndef JAX_MOE_EP_HANDLERS_H_
#define JAX_MOE_EP_HANDLERS_H_

#include "xla/ffi/api/c_api.h"

namespace jax_moe_ep {

extern "C" {
XLA_FFI_Error* PlanInitializeFfi(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* PlanFfi(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* DispatchInitializeFfi(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* DispatchFfi(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* CombineInitializeFfi(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* CombineFfi(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* CombineBackwardFfi(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* RowWeightsInitializeFfi(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* RowWeightsFfi(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* RowWeightsBackwardFfi(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* GroupInstantiateFfi(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* GroupPrepareFfi(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* GroupInitializeFfi(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* GroupDispatchFfi(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* GroupCombineFfi(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* GroupCombineBackwardFfi(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* GroupGatherFfi(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* GroupPlanPrepareFfi(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* GroupPlanInitializeFfi(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* GroupPlanFfi(XLA_FFI_CallFrame* call_frame);
}

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_HANDLERS_H_
