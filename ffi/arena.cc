#include "arena.h"

#include <cuda_runtime.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <utility>

#include "failure.h"
#include "order.h"

namespace jax_moe_ep {
namespace {

struct Registry {
  std::mutex mutex;
  std::map<std::pair<NcclComm*, int>, std::unique_ptr<Arena>> arenas;
  std::map<int, std::string> next_problem;  // of a device's next meeting, for tests
  std::atomic<int64_t> generation{0};       // of resets
};

// Never destroyed: CUDA may be gone before static destructors run.
Registry& TheRegistry() {
  static Registry* registry = new Registry;
  return *registry;
}

std::string TakeNextProblem(int device) {
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  auto found = registry.next_problem.find(device);
  if (found == registry.next_problem.end()) return "";
  std::string problem = found->second;
  registry.next_problem.erase(found);
  return problem;
}

// Whether kernels on the device can read the address; `own` is current again afterwards. Globals of
// a module are mapped on their own GPU only, with peer access too.
cudaError_t CanRead(int device, int own, const void* address, bool* can_read) {
  cudaPointerAttributes attributes{};
  cudaError_t status = cudaSetDevice(device);
  if (status == cudaSuccess) status = cudaPointerGetAttributes(&attributes, address);
  cudaError_t restored = cudaSetDevice(own);
  *can_read = attributes.devicePointer != nullptr;
  return status == cudaSuccess ? restored : status;
}

}  // namespace

int64_t HalfBytes(int64_t bytes) {
  if (bytes == 0) return 0;
  int64_t half = kMinHalfBytes;
  while (half < bytes) half *= 2;
  return half;
}

static int64_t RegionBytes(int64_t half_bytes) {
  return half_bytes ? RoundToAllocation(kRegionHeaderBytes + 2 * half_bytes) : 0;
}

int64_t ArenaBytes(int64_t half_bytes) {
  return RoundToAllocation(sizeof(Control)) + RegionBytes(half_bytes);
}

Arena* Arena::Get(NcclComm* comm) {
  int device = 0;
  cudaGetDevice(&device);
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  std::unique_ptr<Arena>& arena = registry.arenas[{comm, device}];
  if (arena == nullptr) arena.reset(new Arena(comm, device));
  return arena.get();
}

// Of all ranks in this process: when one fails alike they all must, or those that go on would wait
// for it in XLA's collectives.
ffi::Error Arena::CheckFailure() const {
  if (failure_ == nullptr || generation_ != TheRegistry().generation) return ffi::Error::Success();
  std::string consequence;
  for (int rank = 0; rank < num_ranks(); ++rank) {
    if (peers_.failures[rank] == nullptr) continue;
    Failure failure = *peers_.failures[rank];
    if (failure.kind == FailureKind::kNone) continue;
    std::string text = Describe(failure, num_ranks(), peers_.devices[rank]);
    if (failure.kind != FailureKind::kPeer) return Internal(std::move(text));
    consequence = std::move(text);
  }
  return consequence.empty() ? ffi::Error::Success() : Internal(std::move(consequence));
}

ffi::Error Arena::CheckOthers() {
  std::vector<std::string> texts = Failures();
  return texts.empty() ? ffi::Error::Success() : Internal(std::move(texts.front()));
}

ffi::Error Arena::Ensure(int64_t half_bytes, const AllocateScratch& allocate, uint64_t timeout_ns) {
  int64_t generation = TheRegistry().generation;
  if (control_.bytes == 0) {
    JAX_MOE_EP_RETURN_IF_ERROR(Meet(timeout_ns));
  } else if (generation_ != generation) {
    JAX_MOE_EP_RETURN_IF_ERROR(Restart(timeout_ns));
  }
  if (generation_ != generation) {
    std::lock_guard<std::mutex> lock(TheRegistry().mutex);
    generation_ = generation;
  }
  if (half_bytes == 0 || regions_.count(half_bytes)) return ffi::Error::Success();
  SharedMemory region;
  JAX_MOE_EP_RETURN_IF_ERROR(Share(RegionBytes(half_bytes), timeout_ns, &region));
  if (!is_one_process()) {
    JAX_MOE_EP_RETURN_IF_ERROR(SharePool(meeting_.exchange(), allocate(), timeout_ns, &pools_));
  }
  std::lock_guard<std::mutex> lock(TheRegistry().mutex);
  regions_[half_bytes] = region;
  return ffi::Error::Success();
}

ffi::Error Arena::Share(int64_t bytes, uint64_t timeout_ns, SharedMemory* shared) {
  return meeting_.Share(bytes, failure_, TakeNextProblem(device_), timeout_ns, shared, &peers_);
}

ffi::Error Arena::Meet(uint64_t timeout_ns) {
  if (failure_ == nullptr) {
    JAX_MOE_EP_RETURN_IF_ERROR(meeting_.Start(comm_, device_));
    Failure* failure = nullptr;
    JAX_MOE_EP_RETURN_IF_CUDA_ERROR(
        cudaHostAlloc(&failure, sizeof(Failure), cudaHostAllocMapped | cudaHostAllocPortable));
    *failure = Failure{};
    std::lock_guard<std::mutex> lock(TheRegistry().mutex);
    failure_ = failure;
  }
  SharedMemory control;
  JAX_MOE_EP_RETURN_IF_ERROR(Share(RoundToAllocation(sizeof(Control)), timeout_ns, &control));
  std::lock_guard<std::mutex> lock(TheRegistry().mutex);
  control_ = control;
  return ffi::Error::Success();
}

// After Reset, which has waited for this process's kernels: once all ranks are here, no kernel of
// the group runs, and between the two agreements each clears what is its own.
ffi::Error Arena::Restart(uint64_t timeout_ns) {
  JAX_MOE_EP_RETURN_IF_CUDA_ERROR(cudaDeviceSynchronize());  // what began beside Reset
  JAX_MOE_EP_RETURN_IF_ERROR(meeting_.Agree("", timeout_ns));
  cudaStream_t stream = meeting_.stream();
  cudaError_t status = cudaMemsetAsync(own_control(), 0, sizeof(Control), stream);
  if (status == cudaSuccess) status = cudaStreamSynchronize(stream);
  *failure_ = Failure{};
  return meeting_.Agree(status == cudaSuccess ? "" : cudaGetErrorString(status), timeout_ns);
}

GroupView Arena::View(int64_t half_bytes) const {
  GroupView view{};
  view.num_ranks = num_ranks();
  view.rank = rank();
  view.half_bytes = half_bytes;
  view.failure = failure_;
  auto region = regions_.find(half_bytes);
  for (int peer = 0; peer < num_ranks(); ++peer) {
    view.controls[peer] = reinterpret_cast<Control*>(control_.addresses[peer]);
    if (region == regions_.end()) continue;
    view.regions[peer] = region->second.addresses[peer] + kRegionHeaderBytes;
  }
  return view;
}

ffi::Error Arena::Publish(const char* what, const void* address, int64_t bytes, GroupView* view) {
  if (is_one_process()) {
    JAX_MOE_EP_RETURN_IF_ERROR(CheckPeersCanRead(what, address));
    for (int peer = 0; peer < num_ranks(); ++peer) {
      view->published[peer] = static_cast<const char*>(address);
    }
  }
  for (const SharedPool& pool : pools_) {
    if (pool.Publish(address, bytes, num_ranks(), view->published)) break;
  }
  num_in_place_ += view->is_read_in_place();
  return ffi::Error::Success();
}

// XLA lets all peers into its allocations or none, so one of them is asked.
ffi::Error Arena::CheckPeersCanRead(const char* what, const void* address) const {
  int device = peers_.devices[PeerOf(rank(), num_ranks(), 1)];
  bool can_read = false;
  JAX_MOE_EP_RETURN_IF_CUDA_ERROR(CanRead(device, device_, address, &can_read));
  if (can_read) return ffi::Error::Success();
  return ffi::Error::InvalidArgument(
      std::string(what) +
      " is memory that the other GPUs of the process cannot read, such as a constant of the "
      "program. Pass it as an argument of the jitted function, or set JAX_MOE_EP_FORCE_STAGED=1 "
      "before the function is traced");
}

std::vector<std::string> Arena::Failures() {
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  std::vector<std::string> first, then;
  for (const auto& [key, arena] : registry.arenas) {
    if (arena->failure_ == nullptr || arena->generation_ != registry.generation) continue;
    Failure failure = *arena->failure_;
    if (failure.kind == FailureKind::kNone) continue;
    auto& texts = failure.kind == FailureKind::kPeer ? then : first;
    texts.push_back(Describe(failure, arena->num_ranks(), arena->device_));
  }
  first.insert(first.end(), then.begin(), then.end());
  return first;
}

std::vector<std::map<std::string, int64_t>> Arena::List() {
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  std::vector<std::map<std::string, int64_t>> list;
  for (const auto& [key, arena] : registry.arenas) {
    int64_t bytes = arena->control_.bytes;
    for (const auto& [half, region] : arena->regions_) bytes += region.bytes;
    list.push_back({{"device", key.second},
                    {"rank", arena->rank()},
                    {"num_ranks", arena->num_ranks()},
                    {"is_one_process", arena->is_one_process()},
                    {"num_in_place", arena->num_in_place_},
                    {"bytes", bytes}});
  }
  return list;
}

// Calls write(device, arena) with the device current and idle, for all that have met. No lock is
// held while a device is waited for.
template <typename Write>
void Arena::ForEach(Write write) {
  Registry& registry = TheRegistry();
  std::vector<Arena*> arenas;
  {
    std::lock_guard<std::mutex> lock(registry.mutex);
    for (const auto& [key, arena] : registry.arenas) {
      if (arena->control_.bytes) arenas.push_back(arena.get());
    }
  }
  int before = 0;
  cudaGetDevice(&before);
  for (Arena* arena : arenas) {
    cudaSetDevice(arena->device_);
    cudaDeviceSynchronize();
    write(*arena);
    cudaDeviceSynchronize();
  }
  cudaSetDevice(before);
}

void Arena::Reset() {
  ForEach([](Arena&) {});
  ++TheRegistry().generation;
}

void Arena::SetFault(int device, Fault fault) {
  ForEach([&](Arena& arena) {
    if (arena.device_ != device) return;
    cudaMemcpy(&arena.own_control()->fault, &fault, sizeof(fault), cudaMemcpyHostToDevice);
  });
}

void Arena::SetEpoch(uint64_t epoch) {
  uint64_t epochs[kMaxRanks];
  for (uint64_t& each : epochs) each = epoch;
  uint64_t turn = 2 * epoch;
  ForEach([&](Arena& arena) {
    Control* control = arena.own_control();
    cudaMemcpy(&control->turn, &turn, sizeof(turn), cudaMemcpyHostToDevice);
    cudaMemcpy(control->consumed, epochs, sizeof(epochs), cudaMemcpyHostToDevice);
  });
}

void Arena::FailNextMeeting(int device, std::string reason) {
  Registry& registry = TheRegistry();
  std::lock_guard<std::mutex> lock(registry.mutex);
  registry.next_problem[device] = std::move(reason);
}

}  // namespace jax_moe_ep
