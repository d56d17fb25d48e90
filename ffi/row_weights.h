// row_weights and its backward: one number for every row; one rank.

#ifndef JAX_MOE_EP_ROW_WEIGHTS_H_
#define JAX_MOE_EP_ROW_WEIGHTS_H_

#include "rows.h"

namespace jax_moe_ep {

cudaError_t LoadRowWeights();

// row_weights[slots[t, k]] = weights[t, k]; zero in all other rows, the tail too. Elements of 2 or
// 4 bytes.
cudaError_t LaunchRowWeights(const RowsPlan& plan,
                             const LaunchLimits& limits,
                             const void* weights,
                             void* row_weights,
                             int element_bytes,
                             cudaStream_t stream);

// dweights[t, k] = drow[slots[t, k]], zero at -1.
cudaError_t LaunchRowWeightsBackward(const RowsPlan& plan,
                                     const LaunchLimits& limits,
                                     const void* drow,
                                     void* dweights,
                                     int element_bytes,
                                     cudaStream_t stream);

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_ROW_WEIGHTS_H_
