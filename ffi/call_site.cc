#include "call_site.h"

#include <cuda_runtime.h>

#include <string>

#include "combine.h"
#include "dispatch.h"
#include "plan_group.h"

namespace jax_moe_ep {
namespace {

constexpr int kStatesPerSlab = 512;
constexpr size_t kScratchBytes = 256;
constexpr int64_t kOwnCommunicator = 0;  // the one that XLA's collectives of these groups use

// Counters that no call site uses, by device. They are zero: the last block of a launch leaves them
// so. Slabs are never freed, which would wait for the device.
struct Pool {
  std::mutex mutex;
  std::map<int, std::vector<LaunchState*>> free;
};

Pool& ThePool() {
  static Pool* pool = new Pool;
  return *pool;
}

cudaError_t TakeLaunchState(int device, LaunchState** state) {
  Pool& pool = ThePool();
  std::lock_guard<std::mutex> lock(pool.mutex);
  std::vector<LaunchState*>& free = pool.free[device];
  if (free.empty()) {
    char* slab = nullptr;
    cudaError_t status = cudaMalloc(&slab, kStatesPerSlab * kLaunchStateBytes);
    if (status == cudaSuccess) status = cudaMemset(slab, 0, kStatesPerSlab * kLaunchStateBytes);
    // The memset is asynchronous on another stream than the launches'.
    if (status == cudaSuccess) status = cudaStreamSynchronize(cudaStreamLegacy);
    if (status != cudaSuccess) return status;
    for (int i = 0; i < kStatesPerSlab; ++i) {
      free.push_back(reinterpret_cast<LaunchState*>(slab + i * kLaunchStateBytes));
    }
  }
  *state = free.back();
  free.pop_back();
  return cudaSuccess;
}

cudaError_t LoadGroupKernels() {
  if (cudaError_t status = LoadDispatch(); status != cudaSuccess) return status;
  if (cudaError_t status = LoadGroupCombine(); status != cudaSuccess) return status;
  if (cudaError_t status = LoadGroupCombineBackward(); status != cudaSuccess) return status;
  return LoadGroupPlan();
}

std::vector<std::vector<int64_t>> Groups(const GroupAttributes& attributes) {
  std::vector<std::vector<int64_t>> groups;
  for (size_t begin = 0; begin < attributes.groups.size(); begin += attributes.num_ranks) {
    const int64_t* first = attributes.groups.begin() + begin;
    groups.emplace_back(first, first + attributes.num_ranks);
  }
  return groups;
}

}  // namespace

ffi::TypeId CallSite::id = {};

CallSite::~CallSite() {
  Pool& pool = ThePool();
  std::lock_guard<std::mutex> lock(pool.mutex);
  for (const auto& [device, state] : launches_) pool.free[device].push_back(state);
}

cudaError_t CallSite::Prepare(int device) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (launches_.count(device)) return cudaSuccess;
  if (cudaError_t status = LoadGroupKernels(); status != cudaSuccess) return status;
  LaunchState* state = nullptr;
  if (cudaError_t status = TakeLaunchState(device, &state); status != cudaSuccess) return status;
  launches_[device] = state;
  return cudaSuccess;
}

LaunchState* CallSite::launch(int device) {
  std::lock_guard<std::mutex> lock(mutex_);
  return launches_[device];
}

ffi::Error RequestGroup(CommunicatorContext& context, const GroupAttributes& attributes) {
  if (attributes.num_ranks < 2 || attributes.groups.size() % attributes.num_ranks) {
    return ffi::Error::InvalidArgument(
        "jax_moe_ep: groups must be [number of groups, num_ranks] with num_ranks > 1, got " +
        std::to_string(attributes.groups.size()) +
        " ids and num_ranks=" + std::to_string(attributes.num_ranks));
  }
  return context.RequestCommunicator(
      ffi::GroupMode::kFlattenedId, Groups(attributes), kOwnCommunicator);
}

ffi::ErrorOr<Arena*> GetArena(CommunicatorContext& context, const GroupAttributes& attributes) {
  auto communicator =
      context.GetCommunicator(ffi::GroupMode::kFlattenedId, Groups(attributes), kOwnCommunicator);
  if (!communicator.has_value()) return communicator.error();
  return Arena::Get(reinterpret_cast<NcclComm*>(*communicator));
}

ffi::Error InitializeGroup(CommunicatorContext& context,
                           CallSite* site,
                           ffi::ScratchAllocator& allocator,
                           const GroupAttributes& attributes) {
  auto arena = GetArena(context, attributes);
  if (!arena.has_value()) return arena.error();
  JAX_MOE_EP_RETURN_IF_ERROR((*arena)->CheckFailure());
  // Before the ranks meet: who fails later than that lets the others launch and wait.
  int device = 0;
  JAX_MOE_EP_RETURN_IF_CUDA_ERROR(cudaGetDevice(&device));
  JAX_MOE_EP_RETURN_IF_CUDA_ERROR(site->Prepare(device));
  auto allocate = [&] { return allocator.Allocate(kScratchBytes).value_or(nullptr); };
  // Once the ranks have met, it is known whether they are one process and need to stage.
  JAX_MOE_EP_RETURN_IF_ERROR((*arena)->Ensure(0, allocate, attributes.timeout_ns));
  int64_t bytes = attributes.Layout((*arena)->is_one_process()).total;
  JAX_MOE_EP_RETURN_IF_ERROR((*arena)->Ensure(HalfBytes(bytes), allocate, attributes.timeout_ns));
  return Arena::CheckOthers();
}

ffi::ErrorOr<GroupView> MakeView(const Arena& arena,
                                 CallSite* site,
                                 const GroupAttributes& attributes,
                                 int64_t row_bytes) {
  int device = 0;
  JAX_MOE_EP_RETURN_IF_CUDA_ERROR(cudaGetDevice(&device));
  int64_t bytes = attributes.Layout(arena.is_one_process()).total;
  GroupView view = arena.View(HalfBytes(bytes));
  view.timeout_ns = attributes.timeout_ns;
  view.launch = site->launch(device);
  view.signature = {static_cast<Op>(attributes.op),
                    static_cast<int32_t>(attributes.top_k),
                    attributes.num_tokens,
                    row_bytes,
                    static_cast<uint64_t>(attributes.options_hash)};
  view.hash = Hash(view.signature);
  return view;
}

}  // namespace jax_moe_ep
