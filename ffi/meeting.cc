#include "meeting.h"

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <utility>

#include "identity.h"

namespace jax_moe_ep {
namespace {

// An error that is told in words must not be found again by a later check of the last error.
std::string Text(cudaError_t status) {
  cudaGetLastError();
  return cudaGetErrorString(status);
}

std::string OutOfMemory(int64_t bytes, cudaError_t status) {
  const char* fraction = std::getenv("XLA_PYTHON_CLIENT_MEM_FRACTION");
  return "cudaMalloc of " + std::to_string(bytes) +
         " bytes for the arena: " + cudaGetErrorString(status) +
         ". It is outside of XLA's memory pool: lower XLA_PYTHON_CLIENT_MEM_FRACTION (now " +
         (fraction ? fraction : "the default, 0.75") +
         ") or set XLA_PYTHON_CLIENT_PREALLOCATE=false; jax_moe_ep.memory tells the bytes";
}

}  // namespace

// What ranks tell each other when they meet.
struct Meeting::Hello {
  char problem[320];   // empty when all is well
  char no_handle[64];  // why there is none, or empty
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
  JAX_MOE_EP_RETURN_IF_ERROR(exchange_.Start(comm, device));
  return ToFfiError("jax_moe_ep", cudaMalloc(&unread_, sizeof(uint32_t)));
}

ffi::Error Meeting::Agree(const std::string& problem, uint64_t timeout_ns) {
  Hello mine{};
  snprintf(mine.problem, sizeof(mine.problem), "%s", problem.c_str());
  mine.device = exchange_.device();
  std::vector<Hello> all;
  JAX_MOE_EP_RETURN_IF_ERROR(exchange_.Gather(mine, &all, timeout_ns));
  for (int rank = 0; rank < num_ranks(); ++rank) {
    if (all[rank].problem[0] == 0) continue;
    return Internal("jax_moe_ep: the ranks of the EP group cannot meet. Rank " +
                    std::to_string(rank) + " of " + std::to_string(num_ranks()) + " (GPU " +
                    std::to_string(all[rank].device) + "): " + all[rank].problem);
  }
  return ffi::Error::Success();
}

// Memory with this rank's nonce in it. What went wrong, or nothing.
std::string Meeting::Allocate(bool may_allocate, Hello* mine) {
  cudaError_t status =
      may_allocate ? cudaMalloc(&mine->address, mine->bytes) : cudaErrorMemoryAllocation;
  if (status != cudaSuccess) return OutOfMemory(mine->bytes, status);
  status = cudaMemsetAsync(mine->address, 0, mine->bytes, stream());
  if (status == cudaSuccess) {
    char* word = mine->address + rank() * sizeof(uint64_t);
    status =
        cudaMemcpyAsync(word, &mine->nonce, sizeof(mine->nonce), cudaMemcpyHostToDevice, stream());
  }
  if (status == cudaSuccess) status = cudaStreamSynchronize(stream());
  if (status != cudaSuccess) return "arena: " + Text(status);
  status = cudaIpcGetMemHandle(&mine->handle, mine->address);
  if (status != cudaSuccess) {  // only peers in other processes need it
    snprintf(mine->no_handle, sizeof(mine->no_handle), "%s", Text(status).c_str());
  }
  return "";
}

ffi::Error Meeting::Share(int64_t bytes,
                          const Failure* failure,
                          const std::string& problem,
                          uint64_t timeout_ns,
                          SharedMemory* shared,
                          Peers* peers) {
  JAX_MOE_EP_RETURN_IF_ERROR(exchange_.CheckHasNotGivenUp());
  Hello mine{};
  mine.host = HostToken();
  mine.process = ProcessToken();
  mine.nonce = RandomBits() | 1;  // not what zeroed memory holds
  mine.bytes = bytes;
  mine.device = exchange_.device();
  mine.failure = failure;
  std::string found = Allocate(problem != "out_of_memory", &mine);
  snprintf(mine.problem, sizeof(mine.problem), "%s", found.c_str());
  std::vector<Hello> all;
  JAX_MOE_EP_RETURN_IF_ERROR(exchange_.Gather(mine, &all, timeout_ns));

  // From here on all ranks take the same steps, whatever fails on one.
  shared->bytes = bytes;
  shared->addresses[rank()] = mine.address;
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
  if (agreed.failure()) Release(all, timeout_ns, shared);
  return agreed;
}

// What a failed meeting leaves: owners free their memory once nobody has it mapped.
void Meeting::Release(const std::vector<Hello>& all, uint64_t timeout_ns, SharedMemory* shared) {
  for (int peer = 0; peer < num_ranks(); ++peer) {
    bool is_mapped = shared->addresses[peer] && all[peer].process != all[rank()].process;
    if (is_mapped) cudaIpcCloseMemHandle(shared->addresses[peer]);
  }
  // One that cannot agree keeps its memory: freeing it would wait for the exchange.
  if (Agree("", timeout_ns).success()) cudaFree(shared->addresses[rank()]);
  cudaGetLastError();
  *shared = SharedMemory{};
}

std::string Meeting::MapPeers(const std::vector<Hello>& all, SharedMemory* shared, Peers* peers) {
  peers->is_one_process = true;
  for (int peer = 0; peer < num_ranks(); ++peer) {
    bool is_here = all[peer].process == all[rank()].process;
    peers->is_one_process &= is_here;
    peers->devices[peer] = all[peer].device;
    peers->failures[peer] = is_here ? all[peer].failure : nullptr;
  }
  for (int peer = 0; peer < num_ranks(); ++peer) {
    if (peer == rank()) continue;
    std::string why = MapPeer(all[peer], all[rank()], &shared->addresses[peer]);
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
    if (hello.no_handle[0]) return std::string("it has no cudaIpc handle: ") + hello.no_handle;
    void* mapped = nullptr;
    cudaError_t status =
        cudaIpcOpenMemHandle(&mapped, hello.handle, cudaIpcMemLazyEnablePeerAccess);
    if (status != cudaSuccess) return "cudaIpc: " + Text(status);
    *address = static_cast<char*>(mapped);
    return "";
  }
  int can_access = 0;
  cudaError_t status = cudaDeviceCanAccessPeer(&can_access, exchange_.device(), hello.device);
  if (status == cudaSuccess && can_access == 0) {
    return "no peer access between the GPUs. Use implementation='reference'";
  }
  if (status == cudaSuccess) status = cudaDeviceEnablePeerAccess(hello.device, 0);
  if (status == cudaErrorPeerAccessAlreadyEnabled) {
    cudaGetLastError();
    status = cudaSuccess;
  }
  if (status != cudaSuccess) return "peer access: " + Text(status);
  *address = hello.address;
  return "";
}

// Before the agreement that follows, every rank has written its word into each peer's memory. After
// the one before, all have mapped it.
std::string Meeting::Prove(const std::vector<Hello>& all, const SharedMemory& shared) {
  uint64_t nonces[kMaxRanks] = {};
  for (int peer = 0; peer < num_ranks(); ++peer) nonces[peer] = all[peer].nonce;
  uint32_t peers = 0;
  cudaError_t status = cudaMemsetAsync(unread_, 0, sizeof(uint32_t), stream());
  if (status == cudaSuccess) {
    status = LaunchProve(shared, nonces, num_ranks(), rank(), unread_, stream());
  }
  if (status == cudaSuccess) {
    status = cudaMemcpyAsync(&peers, unread_, sizeof(peers), cudaMemcpyDeviceToHost, stream());
  }
  if (status == cudaSuccess) status = cudaStreamSynchronize(stream());
  if (status != cudaSuccess) return "peer memory: " + Text(status);
  if (peers == 0) return "";
  return "the arena of rank " + std::to_string(__builtin_ctz(peers)) +
         " does not hold what that rank wrote into it";
}

// After the agreement that follows Prove.
std::string Meeting::CheckProof(const std::vector<Hello>& all, const char* own) {
  uint64_t words[kMaxRanks] = {};
  cudaError_t status =
      cudaMemcpyAsync(words, own, num_ranks() * sizeof(uint64_t), cudaMemcpyDeviceToHost, stream());
  if (status == cudaSuccess) status = cudaStreamSynchronize(stream());
  if (status != cudaSuccess) return "arena: " + Text(status);
  for (int peer = 0; peer < num_ranks(); ++peer) {
    if (words[peer] != all[peer].nonce) {
      return "what rank " + std::to_string(peer) + " wrote into this rank's arena is not there";
    }
  }
  return "";
}

}  // namespace jax_moe_ep
