// dispatch: every token to the rows of its experts.

#ifndef JAX_MOE_EP_DISPATCH_H_
#define JAX_MOE_EP_DISPATCH_H_

#include "layout.h"
#include "rows.h"

namespace jax_moe_ep {

// Loads the kernels on the current device and raises their shared-memory limit.
cudaError_t LoadDispatch();

// rows[slots[t, k]] = x[t] for every slot that is not -1; zero in padding and, if asked, the tail.
// row_bytes is a multiple of 16; x and rows are aligned to 16 bytes. One rank.
cudaError_t LaunchDispatch(const RowsPlan& plan,
                           const LaunchLimits& limits,
                           const void* x,
                           void* rows,
                           int64_t row_bytes,
                           cudaStream_t stream);

// The same for the tokens of all ranks of a group: rows[slots[s, t, k]] = x of rank s [t].
cudaError_t LaunchGroupDispatch(const GroupView& group,
                                const RegionLayout& layout,
                                const RowsPlan& plan,
                                const LaunchLimits& limits,
                                const void* x,
                                void* rows,
                                int64_t row_bytes,
                                cudaStream_t stream);

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_DISPATCH_H_
