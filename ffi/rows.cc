#include "rows.h"

#include <cstdlib>

namespace jax_moe_ep {
namespace {

// Whether a device runs code with bulk copies: only what was built for compute capability 9.0 or
// later has them, and a later device may run what was built for an older one.
bool HasBulkCode(int capability) {
  constexpr int kFirst = 90;
  bool is_named = false;  // numbers, not a word like "native"
  for (const char* next = JAX_MOE_EP_ARCHITECTURES; *next != 0;) {
    char* end;
    long built_for = strtol(next, &end, 10);
    if (end == next) {
      ++next;
      continue;
    }
    is_named = true;
    if (built_for >= kFirst && built_for <= capability) return true;
    next = end;
  }
  return !is_named && capability >= kFirst;
}

}  // namespace

cudaError_t GetLaunchLimits(int64_t num_sms, bool force_vector, LaunchLimits* limits) {
  int device, sms, major, minor;
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
  if (cudaError_t status =
          cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
      status != cudaSuccess) {
    return status;
  }
  limits->is_bounded = num_sms < sms;
  limits->num_sms = limits->is_bounded ? static_cast<int>(num_sms) : sms;
  limits->has_bulk_copy = HasBulkCode(10 * major + minor) && !force_vector;
  return cudaSuccess;
}

}  // namespace jax_moe_ep
