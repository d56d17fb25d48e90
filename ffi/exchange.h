// How the ranks of a group tell each other something, on the host: by their communicator.

#ifndef JAX_MOE_EP_EXCHANGE_H_
#define JAX_MOE_EP_EXCHANGE_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "nccl_api.h"

namespace jax_moe_ep {

inline constexpr int64_t kMaxMessageBytes = 1024;

// One rank's side. Every exchange must be made by all ranks, in the same order. Each blocks the
// host for at most timeout_ns.
class Exchange {
 public:
  // Finds out who this rank is, and takes what exchanges need, for good. An error unless the
  // kernels support such a group; it is this rank's alone, and the others give up waiting.
  ffi::Error Start(NcclComm* comm, int device);

  // What all ranks give, by rank.
  template <typename Message>
  ffi::Error Gather(const Message& mine, std::vector<Message>* all, uint64_t timeout_ns) {
    static_assert(std::is_trivially_copyable_v<Message> && sizeof(Message) <= kMaxMessageBytes);
    all->resize(num_ranks_);
    return GatherBytes(&mine, sizeof(Message), all->data(), timeout_ns);
  }

  // After one that nobody came to, it is still waiting on the stream, and so would all that follow.
  ffi::Error CheckHasNotGivenUp() const;

  int device() const { return device_; }
  int num_ranks() const { return num_ranks_; }
  int rank() const { return rank_; }
  cudaStream_t stream() const { return stream_; }

 private:
  ffi::Error GatherBytes(const void* mine, int64_t bytes, void* all, uint64_t timeout_ns);

  NcclComm* comm_ = nullptr;
  int device_ = 0;
  int num_ranks_ = 0;
  int rank_ = -1;
  bool has_given_up_ = false;
  cudaStream_t stream_ = nullptr;
  char* buffer_ = nullptr;  // device: this rank's, then those of all
  char* mirror_ = nullptr;  // pinned: the same
};

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_EXCHANGE_H_
