// GPUs and NCCL made of host memory and threads: as much of both as a meeting needs. A thread is a
// rank and has a device; a stream is a queue of steps that run, in order, when somebody looks.

#include "fake_gpus.h"

#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <iterator>
#include <map>
#include <mutex>
#include <string>

#include "identity.h"
#include "meeting.h"
#include "nccl_api.h"

struct CUstream_st {
  std::deque<std::function<bool()>> steps;  // a step is done when it returns true
};

namespace fake {

std::mutex mutex;
std::map<void*, size_t> memory;  // of devices, allocated
bool can_access_peers = true;
bool is_blind = false;  // proofs read something else
bool is_full = false;   // no device has memory
int nccl_result = jax_moe_ep::kNcclSuccess;

namespace {
thread_local int device = 0;
thread_local int process = 0;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t Return(cudaError_t status) {
  if (status != cudaSuccess) last_error = status;
  return status;
}
}  // namespace

void SetDevice(int index) { device = index; }
void SetProcess(int index) { process = index; }

size_t NumAllocations() {
  std::lock_guard<std::mutex> lock(mutex);
  return memory.size();
}

}  // namespace fake

namespace jax_moe_ep {

struct NcclComm {
  int rank;
  fake::Gathering* group;
};

}  // namespace jax_moe_ep

namespace fake {

// What the ranks of a group have sent so far, by exchange.
struct Gathering {
  int num_ranks;
  std::map<int, std::map<int, std::string>> sent;  // exchange -> rank -> bytes
  std::map<int, int> next;                         // rank -> its next exchange
};

std::vector<jax_moe_ep::NcclComm*> NewGroup(int num_ranks) {
  Gathering* group = new Gathering{num_ranks, {}, {}};
  std::vector<jax_moe_ep::NcclComm*> comms;
  for (int rank = 0; rank < num_ranks; ++rank) {
    comms.push_back(new jax_moe_ep::NcclComm{rank, group});
  }
  return comms;
}

}  // namespace fake

using fake::Return;

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = fake::device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  fake::device = device;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  std::lock_guard<std::mutex> lock(fake::mutex);
  *attributes = {};
  auto next = fake::memory.upper_bound(const_cast<void*>(pointer));
  if (next == fake::memory.begin()) return cudaSuccess;
  auto [start, bytes] = *std::prev(next);
  bool is_in = static_cast<const char*>(pointer) < static_cast<char*>(start) + bytes;
  if (is_in) attributes->devicePointer = const_cast<void*>(pointer);
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  if (fake::is_full) return Return(cudaErrorMemoryAllocation);
  *pointer = malloc(bytes);
  memset(*pointer, 0xab, bytes);
  std::lock_guard<std::mutex> lock(fake::mutex);
  fake::memory[*pointer] = bytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* pointer) {
  std::lock_guard<std::mutex> lock(fake::mutex);
  if (pointer != nullptr && fake::memory.erase(pointer) == 0) {
    return Return(cudaErrorInvalidDevicePointer);
  }
  free(pointer);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  *pointer = calloc(1, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new CUstream_st;
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  while (!stream->steps.empty() && stream->steps.front()()) stream->steps.pop_front();
  return stream->steps.empty() ? cudaSuccess : Return(cudaErrorNotReady);
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  while (cudaStreamQuery(stream) == cudaErrorNotReady) continue;
  fake::last_error = cudaSuccess;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t stream) {
  stream->steps.push_back([=] { return memset(pointer, value, bytes) != nullptr; });
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(
    void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  stream->steps.push_back([=] { return memcpy(to, from, bytes) != nullptr; });
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* pointer) {
  if (fake::process == 0) return Return(cudaErrorNotSupported);  // one process needs none
  memcpy(handle, &pointer, sizeof(pointer));
  return cudaSuccess;
}
cudaError_t cudaIpcOpenMemHandle(void** pointer, cudaIpcMemHandle_t handle, unsigned) {
  memcpy(pointer, &handle, sizeof(*pointer));
  return cudaSuccess;
}
cudaError_t cudaIpcCloseMemHandle(void*) { return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* can_access, int, int) {
  *can_access = fake::can_access_peers;
  return cudaSuccess;
}
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) {
  return Return(cudaErrorPeerAccessAlreadyEnabled);  // XLA was first
}
cudaError_t cudaGetLastError() {
  cudaError_t last = fake::last_error;
  fake::last_error = cudaSuccess;
  return last;
}
const char* cudaGetErrorName(cudaError_t status) {
  return status == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaError";
}
const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorMemoryAllocation ? "out of memory" : "some error";
}

}  // extern "C"

namespace jax_moe_ep {
namespace {

int CommCount(NcclComm* comm, int* count) {
  *count = comm->group->num_ranks;
  return kNcclSuccess;
}
int CommUserRank(NcclComm* comm, int* rank) {
  *rank = comm->rank;
  return kNcclSuccess;
}
// Sends now; receives once all ranks have sent.
int AllGather(
    const void* send, void* receive, size_t count, int, NcclComm* comm, cudaStream_t stream) {
  fake::Gathering* group = comm->group;
  auto exchange = std::make_shared<int>(-1);
  stream->steps.push_back([=] {
    std::lock_guard<std::mutex> lock(fake::mutex);
    if (*exchange < 0) {
      *exchange = group->next[comm->rank]++;
      group->sent[*exchange][comm->rank] = std::string(static_cast<const char*>(send), count);
    }
    if (static_cast<int>(group->sent[*exchange].size()) < group->num_ranks) return false;
    for (const auto& [rank, bytes] : group->sent[*exchange]) {
      memcpy(static_cast<char*>(receive) + rank * count, bytes.data(), count);
    }
    return true;
  });
  return fake::nccl_result;
}
const char* ErrorString(int) { return "some NCCL error"; }

}  // namespace

uint64_t RandomBits() {
  static std::atomic<uint64_t> next{static_cast<uint64_t>(getpid()) << 32};
  return ++next;
}
uint64_t ProcessToken() { return static_cast<uint64_t>(fake::process); }
uint64_t HostToken() { return 1; }

const NcclApi* GetNcclApi(std::string*) {
  static const NcclApi api{CommCount, CommUserRank, AllGather, ErrorString};
  return &api;
}

// As ProveKernel does. Like a launch, it returns the last error, whoever left it.
cudaError_t LaunchProve(const SharedMemory& shared,
                        const uint64_t* nonces,
                        int num_ranks,
                        int rank,
                        uint32_t* unread,
                        cudaStream_t stream) {
  std::vector<uint64_t> expected(nonces, nonces + num_ranks);
  SharedMemory memory = shared;
  stream->steps.push_back([=] {
    for (int peer = 0; peer < num_ranks; ++peer) {
      if (peer == rank) continue;
      uint64_t* proof = reinterpret_cast<uint64_t*>(memory.addresses[peer]);
      if (proof[peer] != expected[peer] || fake::is_blind) *unread |= 1u << peer;
      proof[rank] = expected[rank];
    }
    return true;
  });
  return cudaGetLastError();
}

}  // namespace jax_moe_ep
