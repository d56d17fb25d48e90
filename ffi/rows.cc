#include "rows.h"

namespace jax_moe_ep {

cudaError_t GetLaunchLimits(int64_t num_sms, bool force_vector, LaunchLimits* limits) {
  int device, sms, major;
  if (cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) return status;
  if (cudaError_t status = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
      status != cudaSuccess) {
    return status;
  }
  if (cudaError_t status =
          cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
      status != cudaSuccess) {
    return status;
  }
  limits->is_bounded = num_sms < sms;
  limits->num_sms = limits->is_bounded ? static_cast<int>(num_sms) : sms;
  limits->has_bulk_copy = major >= 9 && !force_vector;
  return cudaSuccess;
}

}  // namespace jax_moe_ep
