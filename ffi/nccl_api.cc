#include "nccl_api.h"

#include <dlfcn.h>

namespace jax_moe_ep {
namespace {

struct Loaded {
  NcclApi api = {};
  std::string why_not;
};

template <typename Function>
void Find(void* library, const char* name, Function* function, std::string* why_not) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  if (*function == nullptr) *why_not = std::string("libnccl.so.2 has no ") + name;
}

Loaded Load() {
  Loaded loaded;
  // NOLOAD: another copy than the one that made the communicator could not use it.
  void* library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) {
    loaded.why_not = "libnccl.so.2, which XLA's collectives use, is not loaded in this process";
    return loaded;
  }
  Find(library, "ncclCommCount", &loaded.api.comm_count, &loaded.why_not);
  Find(library, "ncclCommUserRank", &loaded.api.comm_user_rank, &loaded.why_not);
  Find(library, "ncclAllGather", &loaded.api.all_gather, &loaded.why_not);
  Find(library, "ncclGetErrorString", &loaded.api.get_error_string, &loaded.why_not);
  return loaded;
}

}  // namespace

const NcclApi* GetNcclApi(std::string* why_not) {
  static const Loaded loaded = Load();
  *why_not = loaded.why_not;
  return loaded.why_not.empty() ? &loaded.api : nullptr;
}

}  // namespace jax_moe_ep
