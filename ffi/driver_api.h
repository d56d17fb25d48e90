// The few functions of CUDA's driver that sharing XLA's memory needs, from the library that the
// runtime has loaded. There is no driver at build time.

#ifndef JAX_MOE_EP_DRIVER_API_H_
#define JAX_MOE_EP_DRIVER_API_H_

#include <cuda.h>

#include <cstddef>

namespace jax_moe_ep {

struct DriverApi {
  CUresult (*get_address_range)(CUdeviceptr* base, size_t* bytes, CUdeviceptr address);
  CUresult (*pointer_get_attribute)(void* value, CUpointer_attribute, CUdeviceptr address);
  CUresult (*retain_allocation)(CUmemGenericAllocationHandle*, void* address);
  CUresult (*release)(CUmemGenericAllocationHandle);
  CUresult (*export_handle)(void* shareable,
                            CUmemGenericAllocationHandle,
                            CUmemAllocationHandleType,
                            unsigned long long flags);
  CUresult (*import_handle)(CUmemGenericAllocationHandle*,
                            void* shareable,
                            CUmemAllocationHandleType);
  CUresult (*reserve)(CUdeviceptr* address,
                      size_t bytes,
                      size_t alignment,
                      CUdeviceptr wanted,
                      unsigned long long flags);
  CUresult (*free_reserved)(CUdeviceptr address, size_t bytes);
  CUresult (*map)(CUdeviceptr address,
                  size_t bytes,
                  size_t offset,
                  CUmemGenericAllocationHandle,
                  unsigned long long flags);
  CUresult (*unmap)(CUdeviceptr address, size_t bytes);
  CUresult (*set_access)(CUdeviceptr address, size_t bytes, const CUmemAccessDesc*, size_t count);
};

// The functions, or null where the driver lacks one of them.
const DriverApi* GetDriverApi();

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_DRIVER_API_H_
