#include "rows.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>
#include <utility>

namespace jax_moe_ep {
namespace {

// Whether a device runs what was built for another or the same one. What follows the number in
// CMake's list: "a", code for that one alone, or "f", for its family; "-real", no PTX, which other
// major versions need.
bool RunsOn(int capability, int built_for, std::string_view suffix) {
  bool is_of_one = suffix.substr(0, 1) == "a";
  bool is_of_family = suffix.substr(0, 1) == "f";
  if (built_for > capability) return false;
  if (is_of_one) return built_for == capability;
  if (built_for / 10 == capability / 10) return true;
  return !is_of_family && suffix.find("-real") == suffix.npos;
}

// Whether a device runs code with bulk copies: only what was built for compute capability 9.0 or
// later has them, and a later device may run what was built for an older one.
bool HasBulkCode(int capability) {
  constexpr int kFirst = 90;
  bool is_named = false;  // numbers, not a word like "native"
  for (std::string_view rest = JAX_MOE_EP_ARCHITECTURES; !rest.empty();) {
    std::string_view entry = rest.substr(0, rest.find(';'));
    rest.remove_prefix(std::min(entry.size() + 1, rest.size()));
    char* suffix;
    int built_for = static_cast<int>(strtol(entry.data(), &suffix, 10));
    if (suffix == entry.data()) continue;
    is_named = true;
    entry.remove_prefix(suffix - entry.data());
    if (built_for >= kFirst && RunsOn(capability, built_for, entry)) return true;
  }
  return !is_named && capability >= kFirst;
}

}  // namespace

cudaError_t GetLaunchLimits(int64_t num_sms, bool force_vector, LaunchLimits* limits) {
  int device, sms, major, minor, shared_bytes;
  if (cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) return status;
  for (auto [value, attribute] : {std::pair{&sms, cudaDevAttrMultiProcessorCount},
                                  {&major, cudaDevAttrComputeCapabilityMajor},
                                  {&minor, cudaDevAttrComputeCapabilityMinor},
                                  {&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin}}) {
    cudaError_t status = cudaDeviceGetAttribute(value, attribute, device);
    if (status != cudaSuccess) return status;
  }
  limits->is_bounded = num_sms < sms;
  limits->num_sms = limits->is_bounded ? static_cast<int>(num_sms) : sms;
  limits->has_bulk_copy =
      HasBulkCode(10 * major + minor) && shared_bytes >= kBulkSharedBytes && !force_vector;
  return cudaSuccess;
}

}  // namespace jax_moe_ep
