// The few functions of NCCL that the meeting of a group needs, from the library that made XLA's
// communicator. There is no NCCL at build time.

#ifndef JAX_MOE_EP_NCCL_API_H_
#define JAX_MOE_EP_NCCL_API_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>

namespace jax_moe_ep {

struct NcclComm;  // ncclComm
inline constexpr int kNcclSuccess = 0;
inline constexpr int kNcclInProgress = 7;  // of communicators that do not block
inline constexpr int kNcclBytes = 0;       // ncclInt8

struct NcclApi {
  int (*comm_count)(NcclComm*, int* count);
  int (*comm_user_rank)(NcclComm*, int* rank);
  int (*all_gather)(
      const void* send, void* receive, size_t count, int type, NcclComm*, cudaStream_t);
  const char* (*get_error_string)(int result);
};

// The functions, or null and why not.
const NcclApi* GetNcclApi(std::string* why_not);

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_NCCL_API_H_
