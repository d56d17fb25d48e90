// jax_moe_ep._ffi: the handlers as capsules, and what the doctor reports.

#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "arena.h"
#include "call_site.h"
#include "checks.h"
#include "handlers.h"
#include "hog.h"
#include "plan.h"
#include "xla/ffi/api/c_api.h"
#include "xla/ffi/api/collectives_c_api.h"

namespace nb = nanobind;

namespace jax_moe_ep {
namespace {

void ThrowIfError(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

std::string CudaVersion(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

nb::dict Stages(XLA_FFI_Handler* initialize, XLA_FFI_Handler* execute) {
  nb::dict stages;
  stages["initialize"] = nb::capsule(reinterpret_cast<void*>(initialize));
  stages["execute"] = nb::capsule(reinterpret_cast<void*>(execute));
  return stages;
}

// Where the ranks meet, and counters of the call site.
nb::dict GroupStages(XLA_FFI_Handler* execute,
                     XLA_FFI_Handler* prepare = GroupPrepareFfi,
                     XLA_FFI_Handler* initialize = GroupInitializeFfi) {
  nb::dict stages = Stages(initialize, execute);
  stages["instantiate"] = nb::capsule(reinterpret_cast<void*>(GroupInstantiateFfi));
  stages["prepare"] = nb::capsule(reinterpret_cast<void*>(prepare));
  return stages;
}

nb::dict Registrations() {
  nb::dict targets;
  targets["jax_moe_ep_plan"] = Stages(PlanInitializeFfi, PlanFfi);
  targets["jax_moe_ep_dispatch"] = Stages(DispatchInitializeFfi, DispatchFfi);
  targets["jax_moe_ep_combine"] = Stages(CombineInitializeFfi, CombineFfi);
  targets["jax_moe_ep_combine_backward"] = Stages(CombineInitializeFfi, CombineBackwardFfi);
  targets["jax_moe_ep_row_weights"] = Stages(RowWeightsInitializeFfi, RowWeightsFfi);
  targets["jax_moe_ep_row_weights_backward"] =
      Stages(RowWeightsInitializeFfi, RowWeightsBackwardFfi);
  targets["jax_moe_ep_group_dispatch"] = GroupStages(GroupDispatchFfi);
  targets["jax_moe_ep_group_combine"] = GroupStages(GroupCombineFfi);
  targets["jax_moe_ep_group_combine_backward"] = GroupStages(GroupCombineBackwardFfi);
  targets["jax_moe_ep_group_gather"] = GroupStages(GroupGatherFfi);
  targets["jax_moe_ep_group_plan"] =
      GroupStages(GroupPlanFfi, GroupPlanPrepareFfi, GroupPlanInitializeFfi);
  return targets;
}

// The types of states that XLA keeps for the targets; to be registered before them.
nb::dict StateTypes() {
  static const XLA_FFI_TypeInfo call_site = ffi::MakeTypeInfo<CallSite>();
  nb::dict type;
  type["type_id"] = nb::capsule(reinterpret_cast<void*>(&CallSite::id));
  type["type_info"] = nb::capsule(reinterpret_cast<const void*>(&call_site));
  nb::dict types;
  types["jax_moe_ep_call_site"] = type;
  return types;
}

nb::dict BuildInfo() {
  nb::dict info;
  info["cuda"] = CudaVersion(CUDART_VERSION);
  info["architectures"] = JAX_MOE_EP_ARCHITECTURES;
  info["ffi_api"] = std::to_string(XLA_FFI_API_MAJOR) + "." + std::to_string(XLA_FFI_API_MINOR);
  info["collectives"] = std::to_string(XLA_FFI_Extension_Collectives_MajorVersion) + "." +
                        std::to_string(XLA_FFI_Extension_Collectives_MinorVersion);
  return info;
}

std::string DriverVersion() {
  int version = 0;
  ThrowIfError(cudaDriverGetVersion(&version));
  if (version == 0) throw std::runtime_error("no CUDA driver is installed");
  return CudaVersion(version);
}

std::vector<std::vector<bool>> PeerAccess() {
  int count = 0;
  ThrowIfError(cudaGetDeviceCount(&count));
  std::vector<std::vector<bool>> access(count, std::vector<bool>(count, true));
  for (int from = 0; from < count; ++from) {
    for (int to = 0; to < count; ++to) {
      int can_access = 1;
      if (from != to) ThrowIfError(cudaDeviceCanAccessPeer(&can_access, from, to));
      access[from][to] = can_access != 0;
    }
  }
  return access;
}

int64_t PlanScratch(int num_ranks,
                    int num_experts,
                    int32_t assignments_per_rank,
                    bool by_priority) {
  return PlanScratchSize({num_ranks, num_experts, assignments_per_rank, by_priority, 0});
}

constexpr const char* kOpNames[] = {"dispatch", "combine", "combine_backward", "gather", "plan"};

Op OpOf(const std::string& name) {
  int code = 0;
  for (const char* each : kOpNames) {
    ++code;
    if (name == each) return static_cast<Op>(code);
  }
  throw std::invalid_argument("no op " + name);
}

// One half of the regions that a call needs.
int64_t RegionBytesOf(const std::string& op,
                      bool is_one_process,
                      bool has_weights,
                      int num_ranks,
                      int64_t num_tokens,
                      int64_t top_k,
                      int64_t row_bytes) {
  return RegionLayout(
             OpOf(op), is_one_process, has_weights, num_ranks, num_tokens, top_k, row_bytes)
      .total;
}

int64_t UsedBytes(int device) {
  int before = 0;
  size_t free = 0, total = 0;
  ThrowIfError(cudaGetDevice(&before));
  ThrowIfError(cudaSetDevice(device));
  ThrowIfError(cudaMemGetInfo(&free, &total));
  ThrowIfError(cudaSetDevice(before));
  return static_cast<int64_t>(total - free);
}

void Hog(int device, int num_sms, uint64_t ns) {
  int before = 0;
  ThrowIfError(cudaGetDevice(&before));
  ThrowIfError(cudaSetDevice(device));
  ThrowIfError(LaunchHog(num_sms, ns));
  ThrowIfError(cudaSetDevice(before));
}

nb::dict OpCodes() {
  nb::dict codes;
  for (const char* name : kOpNames) codes[name] = static_cast<int64_t>(OpOf(name));
  return codes;
}

}  // namespace
}  // namespace jax_moe_ep

NB_MODULE(_ffi, m) {
  using namespace jax_moe_ep;
  m.def("registrations", &Registrations, "FFI targets: name -> stage -> capsule.");
  m.def("build_info", &BuildInfo, "What this extension was built with.");
  m.def(
      "num_executions",
      [] { return num_executions.load(); },
      "How often XLA ran a handler on the host; replays of a CUDA graph do not count.");
  m.def("driver_version", &DriverVersion, "The CUDA version of the driver.");
  m.def("peer_access", &PeerAccess, "[from][to]: whether a device can access another's memory.");
  m.def("plan_scratch_size",
        &PlanScratch,
        nb::kw_only(),
        nb::arg("num_ranks"),
        nb::arg("num_experts"),
        nb::arg("assignments_per_rank"),
        nb::arg("by_priority"),
        "int32 words of scratch of a plan.");
  m.def("state_types", &StateTypes, "FFI types: name -> type_id, type_info.");
  m.def("op_codes", &OpCodes, "The ops of a group, by name.");
  m.def("region_bytes",
        &RegionBytesOf,
        nb::kw_only(),
        nb::arg("op"),
        nb::arg("is_one_process"),
        nb::arg("has_weights"),
        nb::arg("num_ranks"),
        nb::arg("num_tokens"),
        nb::arg("top_k"),
        nb::arg("row_bytes"),
        "Bytes that a call uses of one half of a region.");
  m.def("half_bytes", &HalfBytes, nb::arg("bytes"), "The size class of a region's halves.");
  m.def("arena_bytes", &ArenaBytes, nb::arg("half_bytes"), "Device memory with one region.");
  m.def("arenas", &Arena::List, "The arenas of this process.");
  m.def("failures", &Arena::Failures, "What failed since the last reset; first the causes.");
  m.def("reset",
        &Arena::Reset,
        nb::call_guard<nb::gil_scoped_release>(),
        "Waits for the devices; the groups meet again at their next call.");
  m.def(
      "set_fault",
      [](int device, uint64_t delay_ns, bool skips) {
        Arena::SetFault(device, {delay_ns, skips ? 1u : 0u});
      },
      nb::kw_only(),
      nb::arg("device"),
      nb::arg("delay_ns") = 0,
      nb::arg("skips") = false,
      "For tests: calls of a device begin late, or take no part.");
  m.def("set_epoch", &Arena::SetEpoch, nb::arg("epoch"), "For tests: of all idle groups.");
  m.def("fail_next_meeting",
        &Arena::FailNextMeeting,
        nb::arg("device"),
        nb::arg("reason"),
        "For tests: out_of_memory or no_peer_access.");
  m.def("used_bytes", &UsedBytes, nb::arg("device"), "Device memory in use, by all processes.");
  m.def("hog",
        &Hog,
        nb::kw_only(),
        nb::arg("device"),
        nb::arg("num_sms"),
        nb::arg("ns"),
        "For tests: keeps SMs of a device busy; returns at once.");
}
