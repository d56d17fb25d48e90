#include "meeting.h"

#include <cuda_runtime.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <utility>

namespace jax_moe_ep {
namespace {

#define JAX_MOE_EP_RETURN_IF_CUDA_ERROR(expression) \
  JAX_MOE_EP_RETURN_IF_ERROR(ToFfiError("jax_moe_ep", (expression)))

uint64_t RandomBits() {
  std::random_device device;
  return uint64_t{device()} << 32 | device();
}

uint64_t ProcessToken() {
  static const uint64_t token = RandomBits();
  return token;
}

// Equal for processes of one running kernel, in containers too.
uint64_t HostToken() {
  char text[64] = {};
  if (FILE* file = fopen("/proc/sys/kernel/random/boot_id", "r")) {
    if (fgets(text, sizeof(text), file) == nullptr) text[0] = 0;
    fclose(file);
  }
  if (text[0] == 0) gethostname(text, sizeof(text) - 1);
  return std::hash<std::string>{}(text);
}

std::string OutOfMemory(int64_t bytes, cudaError_t status) {
  const char* fraction = std::getenv("XLA_PYTHON_CLIENT_MEM_FRACTION");
  return "cudaMalloc of " + std::to_string(bytes) +
         " bytes for the arena: " + cudaGetErrorString(status) +
         ". It is outside of XLA's memory pool: lower XLA_PYTHON_CLIENT_MEM_FRACTION (now " +
         (fraction ? fraction : "the default, 0.75") +
         ") or set XLA_PYTHON_CLIENT_PREALLOCATE=false; jax_moe_ep.memory tells the bytes";
}

ffi::Error Internal(std::string text) { return ffi::Error::Internal(std::move(text)); }

}  // namespace

// What ranks tell each other when they meet.
struct Meeting::Hello {
  char problem[320];  // empty when all is well
  uint64_t host;
  uint64_t process;
  uint64_t nonce;
  int64_t bytes;
  int32_t device;
  char* address;
  const Failure* failure;  // in the memory of `process`
  cudaIpcMemHandle_t handle;
};

ffi::Error Meeting::Start(NcclComm* comm, int device) {
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
  return ToFfiError("jax_moe_ep", cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
}

ffi::Error Meeting::Exchange(const Hello& mine, std::vector<Hello>* all, uint64_t timeout_ns) {
  std::string why_not;
  const NcclApi* nccl = GetNcclApi(&why_not);
  char* buffer = nullptr;
  JAX_MOE_EP_RETURN_IF_CUDA_ERROR(cudaMalloc(&buffer, (num_ranks_ + 1) * sizeof(Hello)));
  char* gathered = buffer + sizeof(Hello);
  all->resize(num_ranks_);
  JAX_MOE_EP_RETURN_IF_CUDA_ERROR(
      cudaMemcpyAsync(buffer, &mine, sizeof(Hello), cudaMemcpyHostToDevice, stream_));
  int result = nccl->all_gather(buffer, gathered, sizeof(Hello), kNcclBytes, comm_, stream_);
  if (result != kNcclSuccess) {
    return Internal(std::string("jax_moe_ep: ncclAllGather: ") + nccl->get_error_string(result));
  }
  JAX_MOE_EP_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(
      all->data(), gathered, num_ranks_ * sizeof(Hello), cudaMemcpyDeviceToHost, stream_));
  auto start = std::chrono::steady_clock::now();
  cudaError_t status;
  while ((status = cudaStreamQuery(stream_)) == cudaErrorNotReady) {
    if (std::chrono::steady_clock::now() - start > std::chrono::nanoseconds(timeout_ns)) {
      return Internal("jax_moe_ep: rank " + std::to_string(rank_) + " of " +
                      std::to_string(num_ranks_) + " waited " + std::to_string(timeout_ns / 1e9) +
                      " s for the others to meet. Do all ranks run the same program, and did all "
                      "of them call jax_moe_ep.reset() if one did?");
    }
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  JAX_MOE_EP_RETURN_IF_CUDA_ERROR(status);
  return ToFfiError("jax_moe_ep", cudaFree(buffer));
}

ffi::Error Meeting::Agree(const std::string& problem, uint64_t timeout_ns) {
  Hello mine{};
  snprintf(mine.problem, sizeof(mine.problem), "%s", problem.c_str());
  mine.device = device_;
  std::vector<Hello> all;
  JAX_MOE_EP_RETURN_IF_ERROR(Exchange(mine, &all, timeout_ns));
  for (int rank = 0; rank < num_ranks_; ++rank) {
    if (all[rank].problem[0] == 0) continue;
    return Internal("jax_moe_ep: the ranks of the EP group cannot meet. Rank " +
                    std::to_string(rank) + " of " + std::to_string(num_ranks_) + " (GPU " +
                    std::to_string(all[rank].device) + "): " + all[rank].problem);
  }
  return ffi::Error::Success();
}

// Memory with this rank's nonce in it. What went wrong, or nothing.
std::string Meeting::Allocate(bool may_allocate, Hello* mine) {
  cudaError_t status =
      may_allocate ? cudaMalloc(&mine->address, mine->bytes) : cudaErrorMemoryAllocation;
  if (status != cudaSuccess) {
    cudaGetLastError();  // it is told: later calls must not find it
    return OutOfMemory(mine->bytes, status);
  }
  status = cudaMemsetAsync(mine->address, 0, mine->bytes, stream_);
  if (status == cudaSuccess) {
    char* word = mine->address + rank_ * sizeof(uint64_t);
    status =
        cudaMemcpyAsync(word, &mine->nonce, sizeof(mine->nonce), cudaMemcpyHostToDevice, stream_);
  }
  if (status == cudaSuccess) status = cudaIpcGetMemHandle(&mine->handle, mine->address);
  return status == cudaSuccess ? "" : std::string("arena: ") + cudaGetErrorString(status);
}

ffi::Error Meeting::Share(int64_t bytes,
                          const Failure* failure,
                          const std::string& problem,
                          uint64_t timeout_ns,
                          SharedMemory* shared,
                          Peers* peers) {
  Hello mine{};
  mine.host = HostToken();
  mine.process = ProcessToken();
  mine.nonce = RandomBits() | 1;  // not what zeroed memory holds
  mine.bytes = bytes;
  mine.device = device_;
  mine.failure = failure;
  std::string found = Allocate(problem != "out_of_memory", &mine);
  snprintf(mine.problem, sizeof(mine.problem), "%s", found.c_str());
  std::vector<Hello> all;
  JAX_MOE_EP_RETURN_IF_ERROR(Exchange(mine, &all, timeout_ns));

  // From here on all ranks take the same steps, whatever fails on one.
  shared->bytes = bytes;
  shared->addresses[rank_] = mine.address;
  bool is_complete = true;
  for (const Hello& each : all) is_complete &= each.problem[0] == 0;
  if (problem == "no_peer_access") {
    found = "no peer access to any GPU (as a test asked)";
  } else if (is_complete) {
    found = MapPeers(all, shared, peers);
  }
  ffi::Error agreed = Agree(found, timeout_ns);
  if (agreed.success()) agreed = Agree(Prove(all, *shared), timeout_ns);
  if (agreed.success()) agreed = Agree(CheckProof(all, mine.address), timeout_ns);
  if (agreed.failure()) {
    cudaFree(mine.address);
    *shared = SharedMemory{};
  }
  return agreed;
}

std::string Meeting::MapPeers(const std::vector<Hello>& all, SharedMemory* shared, Peers* peers) {
  peers->is_one_process = true;
  for (int peer = 0; peer < num_ranks_; ++peer) {
    bool is_here = all[peer].process == all[rank_].process;
    peers->is_one_process &= is_here;
    peers->devices[peer] = all[peer].device;
    peers->failures[peer] = is_here ? all[peer].failure : nullptr;
    if (peer == rank_) continue;
    std::string why = MapPeer(all[peer], all[rank_], &shared->addresses[peer]);
    if (!why.empty()) {
      return "rank " + std::to_string(peer) + " (GPU " + std::to_string(all[peer].device) +
             ") cannot be reached: " + why;
    }
  }
  return "";
}

// Why not, or nothing.
std::string Meeting::MapPeer(const Hello& hello, const Hello& mine, char** address) {
  if (hello.host != mine.host) {
    return "it is on another host. Use implementation='reference' for such a group";
  }
  if (hello.bytes != mine.bytes) return "its arena has another size. Do all ranks run one program?";
  if (hello.process != mine.process) {
    void* mapped = nullptr;
    cudaError_t status =
        cudaIpcOpenMemHandle(&mapped, hello.handle, cudaIpcMemLazyEnablePeerAccess);
    if (status != cudaSuccess) return std::string("cudaIpc: ") + cudaGetErrorString(status);
    *address = static_cast<char*>(mapped);
    return "";
  }
  int can_access = 0;
  cudaError_t status = cudaDeviceCanAccessPeer(&can_access, device_, hello.device);
  if (status == cudaSuccess && can_access == 0) {
    return "no peer access between the GPUs. Use implementation='reference'";
  }
  if (status == cudaSuccess) status = cudaDeviceEnablePeerAccess(hello.device, 0);
  if (status == cudaErrorPeerAccessAlreadyEnabled) {
    cudaGetLastError();
    status = cudaSuccess;
  }
  if (status != cudaSuccess) return std::string("peer access: ") + cudaGetErrorString(status);
  *address = hello.address;
  return "";
}

// Before the agreement that follows, every rank has written its word into each peer's memory. After
// the one before, all have mapped it.
std::string Meeting::Prove(const std::vector<Hello>& all, const SharedMemory& shared) {
  uint64_t nonces[kMaxRanks] = {};
  for (int peer = 0; peer < num_ranks_; ++peer) nonces[peer] = all[peer].nonce;
  uint32_t* unread = nullptr;
  uint32_t peers = 0;
  cudaError_t status = cudaMalloc(&unread, sizeof(uint32_t));
  if (status == cudaSuccess) status = cudaMemsetAsync(unread, 0, sizeof(uint32_t), stream_);
  if (status == cudaSuccess) {
    status = LaunchProve(shared, nonces, num_ranks_, rank_, unread, stream_);
  }
  if (status == cudaSuccess) {
    status = cudaMemcpyAsync(&peers, unread, sizeof(peers), cudaMemcpyDeviceToHost, stream_);
  }
  if (status == cudaSuccess) status = cudaStreamSynchronize(stream_);
  if (unread != nullptr) cudaFree(unread);
  if (status != cudaSuccess) return std::string("peer memory: ") + cudaGetErrorString(status);
  if (peers == 0) return "";
  return "the arena of rank " + std::to_string(__builtin_ctz(peers)) +
         " does not hold what that rank wrote into it";
}

// After the agreement that follows Prove.
std::string Meeting::CheckProof(const std::vector<Hello>& all, const char* own) {
  uint64_t words[kMaxRanks] = {};
  cudaError_t status =
      cudaMemcpyAsync(words, own, num_ranks_ * sizeof(uint64_t), cudaMemcpyDeviceToHost, stream_);
  if (status == cudaSuccess) status = cudaStreamSynchronize(stream_);
  if (status != cudaSuccess) return std::string("arena: ") + cudaGetErrorString(status);
  for (int peer = 0; peer < num_ranks_; ++peer) {
    if (words[peer] != all[peer].nonce) {
      return "what rank " + std::to_string(peer) + " wrote into this rank's arena is not there";
    }
  }
  return "";
}

}  // namespace jax_moe_ep
