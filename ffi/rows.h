// The receive buffer: which rows hold tokens, and which must be zero.

#ifndef JAX_MOE_EP_ROWS_H_
#define JAX_MOE_EP_ROWS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_moe_ep {

// A plan as the kernels that move data need it. Device pointers are to int32.
struct RowsPlan {
  const int32_t* slots;         // [num_tokens, top_k] row or -1
  const int32_t* group_counts;  // [num_groups]
  const int32_t* group_sizes;   // [num_groups]
  const int32_t* group_starts;  // [num_groups]
  int64_t num_tokens;           // T, of one rank; slots has those of all
  int top_k;                    // K
  int num_groups;               // L
  int alignment;                // A: no group has more than A rows of padding
  int64_t capacity;             // C
  bool zero_tail;
};

// Shared memory of a block that kernels with bulk copies may need, of the 227 KB of compute
// capability 9.0 and 10.0. Devices with less, as 12.0 with 99 KB, do without them.
inline constexpr int kBulkSharedBytes = 208 * 1024;

// How a launch may use the device.
struct LaunchLimits {
  int num_sms;      // the most SMs to fill
  bool is_bounded;  // the user set num_sms
  bool has_bulk_copy;
};

// What the current device offers, within num_sms; force_vector ignores bulk copies.
cudaError_t GetLaunchLimits(int64_t num_sms, bool force_vector, LaunchLimits* limits);

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_ROWS_H_
