// jax_moe_ep._ffi: the handlers as capsules, and what the doctor reports.

#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "checks.h"
#include "handlers.h"
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

nb::dict Registrations() {
  nb::dict targets;
  targets["jax_moe_ep_plan"] = Stages(PlanInitializeFfi, PlanFfi);
  targets["jax_moe_ep_dispatch"] = Stages(DispatchInitializeFfi, DispatchFfi);
  targets["jax_moe_ep_combine"] = Stages(CombineInitializeFfi, CombineFfi);
  targets["jax_moe_ep_combine_backward"] = Stages(CombineInitializeFfi, CombineBackwardFfi);
  targets["jax_moe_ep_row_weights"] = Stages(RowWeightsInitializeFfi, RowWeightsFfi);
  targets["jax_moe_ep_row_weights_backward"] =
      Stages(RowWeightsInitializeFfi, RowWeightsBackwardFfi);
  return targets;
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
  return PlanScratchSize({num_ranks, num_experts, assignments_per_rank, by_priority});
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
}
