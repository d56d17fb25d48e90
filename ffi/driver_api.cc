#include "driver_api.h"

#include <dlfcn.h>

namespace jax_moe_ep {
namespace {

struct Loaded {
  DriverApi api = {};
  bool is_complete = false;
};

template <typename Function>
void Find(void* library, const char* name, Function* function, bool* is_complete) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  *is_complete &= *function != nullptr;
}

Loaded Load() {
  Loaded loaded;
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) return loaded;
  loaded.is_complete = true;
  auto find = [&](const char* name, auto* function) {
    Find(library, name, function, &loaded.is_complete);
  };
  find("cuMemGetAddressRange_v2", &loaded.api.get_address_range);
  find("cuPointerGetAttribute", &loaded.api.pointer_get_attribute);
  find("cuMemRetainAllocationHandle", &loaded.api.retain_allocation);
  find("cuMemRelease", &loaded.api.release);
  find("cuMemExportToShareableHandle", &loaded.api.export_handle);
  find("cuMemImportFromShareableHandle", &loaded.api.import_handle);
  find("cuMemAddressReserve", &loaded.api.reserve);
  find("cuMemAddressFree", &loaded.api.free_reserved);
  find("cuMemMap", &loaded.api.map);
  find("cuMemUnmap", &loaded.api.unmap);
  find("cuMemSetAccess", &loaded.api.set_access);
  return loaded;
}

}  // namespace

const DriverApi* GetDriverApi() {
  static const Loaded loaded = Load();
  return loaded.is_complete ? &loaded.api : nullptr;
}

}  // namespace jax_moe_ep
