#include "hog.h"
#include "signal.cuh"

namespace jax_moe_ep {
namespace {

constexpr int kSharedBytes = 200 * 1024;  // of 227 KB: no second block fits an SM

// Launch: a block of one thread an SM, with kSharedBytes of shared memory.
__global__ void HogKernel(uint64_t ns) {
  for (uint64_t start = TimeNs(); TimeNs() - start < ns;) __nanosleep(1000);
}

}  // namespace

cudaError_t LaunchHog(int num_sms, uint64_t ns) {
  cudaStream_t stream;
  if (cudaError_t status = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
      status != cudaSuccess) {
    return status;
  }
  if (cudaError_t status = cudaFuncSetAttribute(
          HogKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
      status != cudaSuccess) {
    return status;
  }
  HogKernel<<<num_sms, 1, kSharedBytes, stream>>>(ns);
  if (cudaError_t status = cudaGetLastError(); status != cudaSuccess) return status;
  return cudaStreamDestroy(stream);  // once its work is done
}

}  // namespace jax_moe_ep
