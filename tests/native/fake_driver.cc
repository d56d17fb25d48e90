// CUDA's driver made of files in memory: as much of it as sharing XLA's pool needs.

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <iterator>
#include <map>
#include <mutex>
#include <thread>

#include "driver_api.h"
#include "fake_gpus.h"

namespace fake {

thread_local bool can_export = true;
thread_local bool can_map = true;
thread_local bool is_slow_to_export = false;
thread_local bool is_slow_to_import = false;
thread_local bool exports_nothing = false;

namespace {

struct File {
  int number;
  size_t bytes;
  uint64_t id;
};

std::mutex driver_mutex;
std::map<char*, File> pools;  // by address
uint64_t last_id = 0;
int num_mappings = 0;

const std::pair<char* const, File>* Find(CUdeviceptr pointer) {
  char* address = reinterpret_cast<char*>(pointer);
  auto next = pools.upper_bound(address);
  if (next == pools.begin()) return nullptr;
  auto found = std::prev(next);
  return address < found->first + found->second.bytes ? &*found : nullptr;
}

void WaitLong() { std::this_thread::sleep_for(std::chrono::milliseconds(300)); }

CUresult GetAddressRange(CUdeviceptr* base, size_t* bytes, CUdeviceptr address) {
  std::lock_guard<std::mutex> lock(driver_mutex);
  const auto* found = Find(address);
  if (found == nullptr) return CUDA_ERROR_NOT_FOUND;
  *base = reinterpret_cast<CUdeviceptr>(found->first);
  *bytes = found->second.bytes;
  return CUDA_SUCCESS;
}

CUresult PointerGetAttribute(void* value, CUpointer_attribute, CUdeviceptr address) {
  std::lock_guard<std::mutex> lock(driver_mutex);
  const auto* found = Find(address);
  if (found == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *static_cast<unsigned long long*>(value) = found->second.id;
  return CUDA_SUCCESS;
}

// A handle is a descriptor of its own.
CUresult RetainAllocation(CUmemGenericAllocationHandle* handle, void* address) {
  std::lock_guard<std::mutex> lock(driver_mutex);
  const auto* found = Find(reinterpret_cast<CUdeviceptr>(address));
  if (found == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *handle = dup(found->second.number);
  return CUDA_SUCCESS;
}

CUresult Release(CUmemGenericAllocationHandle handle) {
  return close(static_cast<int>(handle)) == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult ExportHandle(void* shareable,
                      CUmemGenericAllocationHandle handle,
                      CUmemAllocationHandleType type,
                      unsigned long long) {
  if (is_slow_to_export) WaitLong();
  if (!can_export || type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  *static_cast<int*>(shareable) = exports_nothing ? 1 << 20 : dup(static_cast<int>(handle));
  return CUDA_SUCCESS;
}

CUresult ImportHandle(CUmemGenericAllocationHandle* handle,
                      void* shareable,
                      CUmemAllocationHandleType) {
  if (is_slow_to_import) WaitLong();
  *handle = dup(static_cast<int>(reinterpret_cast<intptr_t>(shareable)));
  return CUDA_SUCCESS;
}

CUresult Reserve(CUdeviceptr* address, size_t bytes, size_t, CUdeviceptr, unsigned long long) {
  void* reserved = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  *address = reinterpret_cast<CUdeviceptr>(reserved);
  return reserved != MAP_FAILED ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult FreeReserved(CUdeviceptr address, size_t bytes) {
  munmap(reinterpret_cast<void*>(address), bytes);
  return CUDA_SUCCESS;
}

CUresult Map(CUdeviceptr address,
             size_t bytes,
             size_t,
             CUmemGenericAllocationHandle handle,
             unsigned long long) {
  struct stat file;
  int number = static_cast<int>(handle);
  bool fits = fstat(number, &file) == 0 && static_cast<size_t>(file.st_size) == bytes;
  if (!can_map || !fits) return CUDA_ERROR_INVALID_VALUE;
  mmap(reinterpret_cast<void*>(address), bytes, PROT_READ, MAP_SHARED | MAP_FIXED, number, 0);
  std::lock_guard<std::mutex> lock(driver_mutex);
  ++num_mappings;
  return CUDA_SUCCESS;
}

CUresult Unmap(CUdeviceptr, size_t) {
  std::lock_guard<std::mutex> lock(driver_mutex);
  --num_mappings;
  return CUDA_SUCCESS;
}

CUresult SetAccess(CUdeviceptr, size_t, const CUmemAccessDesc*, size_t) { return CUDA_SUCCESS; }

}  // namespace

char* NewPool(size_t bytes) {
  int number = memfd_create("pool", MFD_CLOEXEC);
  if (ftruncate(number, static_cast<off_t>(bytes)) != 0) return nullptr;
  void* pool = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, number, 0);
  std::lock_guard<std::mutex> lock(driver_mutex);
  pools[static_cast<char*>(pool)] = {number, bytes, ++last_id};
  return static_cast<char*>(pool);
}

void Reallocate(char* pool) {
  std::lock_guard<std::mutex> lock(driver_mutex);
  pools.at(pool).id = ++last_id;
}

int NumPools() {
  std::lock_guard<std::mutex> lock(driver_mutex);
  return static_cast<int>(pools.size());
}

int NumMappings() {
  std::lock_guard<std::mutex> lock(driver_mutex);
  return num_mappings;
}

}  // namespace fake

namespace jax_moe_ep {

const DriverApi* GetDriverApi() {
  static const DriverApi api{fake::GetAddressRange,
                             fake::PointerGetAttribute,
                             fake::RetainAllocation,
                             fake::Release,
                             fake::ExportHandle,
                             fake::ImportHandle,
                             fake::Reserve,
                             fake::FreeReserved,
                             fake::Map,
                             fake::Unmap,
                             fake::SetAccess};
  return &api;
}

}  // namespace jax_moe_ep
