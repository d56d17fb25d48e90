// Prints whether kernels with bulk copies run on a device, for test_limits.py: limits CAPABILITY.

#include <cstdio>
#include <cstdlib>

#include "rows.h"

namespace {

int capability;

// As NVIDIA's programming guide has them, by compute capability.
int SharedBytes() {
  bool is_small = capability == 86 || capability == 89 || capability >= 120;
  return (is_small ? 99 : capability == 80 ? 163 : 227) * 1024;
}

}  // namespace

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  bool is_major = attribute == cudaDevAttrComputeCapabilityMajor;
  bool is_minor = attribute == cudaDevAttrComputeCapabilityMinor;
  bool is_shared = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin;
  *value = is_major    ? capability / 10
           : is_minor  ? capability % 10
           : is_shared ? SharedBytes()
                       : 132;
  return cudaSuccess;
}

int main(int, char** argv) {
  capability = atoi(argv[1]);
  jax_moe_ep::LaunchLimits limits;
  if (jax_moe_ep::GetLaunchLimits(1, false, &limits) != cudaSuccess) return 1;
  printf("%d\n", limits.has_bulk_copy);
  return 0;
}
