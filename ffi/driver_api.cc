#include "driver_api.h"

#include <dlfcn.h>

#include <type_traits>

namespace jax_moe_ep {
namespace {

struct Loaded {
  DriverApi api = {};
  bool is_complete = false;
};

Loaded Load() {
  Loaded loaded;
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) return loaded;
  loaded.is_complete = true;
  auto find = [&](const char* name, auto* function) {
    *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(dlsym(library, name));
    loaded.is_complete &= *function != nullptr;
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
