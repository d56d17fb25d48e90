#ifndef JAX_MOE_EP_HOST_DEVICE_H_
#define JAX_MOE_EP_HOST_DEVICE_H_

#ifdef __CUDACC__
#define JAX_MOE_EP_HOST_DEVICE __host__ __device__
#else
#define JAX_MOE_EP_HOST_DEVICE
#endif

#endif  // JAX_MOE_EP_HOST_DEVICE_H_
