#include "exchange.h"

#include <cuda_runtime.h>

#include <chrono>
#include <cstring>
#include <string>
#include <thread>
#include <utility>

#include "layout.h"

namespace jax_moe_ep {
ffi::Error Exchange::Start(NcclComm* comm, int device) {
  std::string why_not;
  const NcclApi* nccl = GetNcclApi(&why_not);
  if (nccl == nullptr) return Internal("jax_moe_ep: " + why_not);
  if (nccl->comm_count(comm, &num_ranks_) != kNcclSuccess ||
      nccl->comm_user_rank(comm, &rank_) != kNcclSuccess) {
    return Internal("jax_moe_ep: NCCL does not know the group's communicator");
  }
  if (num_ranks_ > kMaxRanks) {
    return Internal("jax_moe_ep: an EP group has " + std::to_string(num_ranks_) +
                    " ranks, the CUDA kernels support " + std::to_string(kMaxRanks) +
                    "; use implementation='reference'");
  }
  comm_ = comm;
  device_ = device;
  int64_t bytes = (num_ranks_ + 1) * kMaxMessageBytes;
  JAX_MOE_EP_RETURN_IF_CUDA_ERROR(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  JAX_MOE_EP_RETURN_IF_CUDA_ERROR(cudaHostAlloc(&mirror_, bytes, cudaHostAllocDefault));
  return ToFfiError("jax_moe_ep", cudaMalloc(&buffer_, bytes));
}

ffi::Error Exchange::CheckHasNotGivenUp() const {
  if (!has_given_up_) return ffi::Error::Success();
  return Internal(
      "jax_moe_ep: an earlier meeting of this group did not come about, and its exchange is still "
      "waiting. Start the processes again");
}

// The host polls instead of waiting, so that it can give up. Copies to the host must not wait for
// it either, hence pinned memory; after giving up they are still under way, hence memory that
// stays.
ffi::Error Exchange::GatherBytes(const void* mine, int64_t bytes, void* all, uint64_t timeout_ns) {
  JAX_MOE_EP_RETURN_IF_ERROR(CheckHasNotGivenUp());
  std::string why_not;
  const NcclApi* nccl = GetNcclApi(&why_not);
  // All of a place, so that ranks in different exchanges give NCCL equal sizes, too.
  constexpr int64_t kBytes = kMaxMessageBytes;
  char* gathered = mirror_ + kBytes;
  memcpy(mirror_, mine, bytes);
  JAX_MOE_EP_RETURN_IF_CUDA_ERROR(
      cudaMemcpyAsync(buffer_, mirror_, kBytes, cudaMemcpyHostToDevice, stream_));
  int result = nccl->all_gather(buffer_, buffer_ + kBytes, kBytes, kNcclBytes, comm_, stream_);
  if (result == kNcclInProgress) {
    has_given_up_ = true;
    return Internal(
        "jax_moe_ep: EP groups need NCCL communicators that block, and these do not. Leave "
        "--xla_gpu_nccl_blocking_communicators at its default, true");
  }
  if (result != kNcclSuccess) {
    return Internal(std::string("jax_moe_ep: ncclAllGather: ") + nccl->get_error_string(result));
  }
  JAX_MOE_EP_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(
      gathered, buffer_ + kBytes, num_ranks_ * kBytes, cudaMemcpyDeviceToHost, stream_));
  auto start = std::chrono::steady_clock::now();
  cudaError_t status;
  while ((status = cudaStreamQuery(stream_)) == cudaErrorNotReady) {
    if (std::chrono::steady_clock::now() - start > std::chrono::nanoseconds(timeout_ns)) {
      has_given_up_ = true;
      cudaGetLastError();  // cudaErrorNotReady
      return Internal("jax_moe_ep: rank " + std::to_string(rank_) + " of " +
                      std::to_string(num_ranks_) + " waited " + std::to_string(timeout_ns / 1e9) +
                      " s for the others to meet. Do all ranks run the same program, and did all "
                      "of them call jax_moe_ep.reset() if one did?");
    }
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  cudaGetLastError();  // cudaErrorNotReady, if it had to wait
  JAX_MOE_EP_RETURN_IF_CUDA_ERROR(status);
  for (int rank = 0; rank < num_ranks_; ++rank) {
    memcpy(static_cast<char*>(all) + rank * bytes, gathered + rank * kBytes, bytes);
  }
  return ffi::Error::Success();
}

}  // namespace jax_moe_ep
