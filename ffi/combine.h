// combine and its backward: the rows of every token, summed.

#ifndef JAX_MOE_EP_COMBINE_H_
#define JAX_MOE_EP_COMBINE_H_

#include "layout.h"
#include "rows.h"

namespace jax_moe_ep {

enum class FloatType { kF32, kF16, kBF16 };

cudaError_t LoadCombine();

// out[t] = sum over k in order of weights[t, k] * y[slots[t, k]], product and sum rounded to fp32
// one by one, then to the type; +0 for a token without rows. Null weights: a plain sum.
// y [C, row_bytes], out [T, row_bytes]; row_bytes a multiple of 16; weights fp32 [T, K].
cudaError_t LaunchCombine(const RowsPlan& plan,
                          const LaunchLimits& limits,
                          FloatType type,
                          const void* y,
                          const float* weights,
                          void* out,
                          int64_t row_bytes,
                          cudaStream_t stream);

// dy[row] = weights[t, k] * dout[t], dweights[t, k] = <dout[t], y[row]> in fp32 in a fixed order;
// zero in padding, at slots of -1 and, if asked, in the tail.
cudaError_t LaunchCombineBackward(const RowsPlan& plan,
                                  const LaunchLimits& limits,
                                  FloatType type,
                                  const void* dout,
                                  const void* y,
                                  const float* weights,
                                  void* dy,
                                  float* dweights,
                                  int64_t row_bytes,
                                  cudaStream_t stream);

// The same in a group, for the tokens of all ranks. Rows of row_bytes; weights and owners [T, K] of
// this rank.
struct CombineArrays {
  FloatType type;
  const int32_t* owners;
  const void* y;         // [C, H]
  const float* weights;  // or null
  void* out;             // [T, H]
  int64_t row_bytes;
  bool has_few_sms;  // on all ranks: asked for, not found
};

struct CombineBackwardArrays {
  FloatType type;
  const int32_t* owners;
  const void* dout;  // [T, H]
  const void* y;     // [C, H]
  const float* weights;
  void* dy;  // [C, H]
  float* dweights;
  int64_t row_bytes;
};

cudaError_t LoadGroupCombine();
cudaError_t LaunchGroupCombine(const GroupView& group,
                               const RegionLayout& layout,
                               const RowsPlan& plan,
                               const LaunchLimits& limits,
                               const CombineArrays& arrays,
                               cudaStream_t stream);

cudaError_t LoadGroupCombineBackward();
cudaError_t LaunchGroupCombineBackward(const GroupView& group,
                                       const RegionLayout& layout,
                                       const RowsPlan& plan,
                                       const LaunchLimits& limits,
                                       const CombineBackwardArrays& arrays,
                                       cudaStream_t stream);

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_COMBINE_H_
