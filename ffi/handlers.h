// The FFI handlers that module.cc registers: two stages an op.

#ifndef JAX_MOE_EP_HANDLERS_H_
#define JAX_MOE_EP_HANDLERS_H_

#include "xla/ffi/api/c_api.h"

namespace jax_moe_ep {

extern "C" {
XLA_FFI_Error* PlanInitializeFfi(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* PlanFfi(XLA_FFI_CallFrame* call_frame);
}

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_HANDLERS_H_
