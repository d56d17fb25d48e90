// Argument checks of the FFI handlers: each error names argument, got, expected.

#ifndef JAX_MOE_EP_CHECKS_H_
#define JAX_MOE_EP_CHECKS_H_

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace jax_moe_ep {

namespace ffi = ::xla::ffi;

// How often a handler ran on the host: tests see from it that XLA replays a captured graph instead.
inline std::atomic<int64_t> num_executions{0};

inline std::string DimsToString(const int64_t* dims, size_t rank) {
  std::string text = "[";
  for (size_t i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

// An error unless the buffer has exactly these dimensions.
template <typename Buffer>
ffi::Error CheckDims(const char* op,
                     const char* argument,
                     const Buffer& buffer,
                     std::initializer_list<int64_t> expected) {
  auto got = buffer.dimensions();
  bool is_equal = got.size() == expected.size();
  for (size_t i = 0; is_equal && i < got.size(); ++i) is_equal = got[i] == expected.begin()[i];
  if (is_equal) return ffi::Error::Success();
  return ffi::Error::InvalidArgument(std::string(op) + ": " + argument + " must have shape " +
                                     DimsToString(expected.begin(), expected.size()) + ", got " +
                                     DimsToString(got.begin(), got.size()));
}

inline ffi::Error Internal(std::string text) { return ffi::Error::Internal(std::move(text)); }

// Once told, an error is not left behind for the next launch, which would be said to have failed.
inline ffi::Error ToFfiError(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return ffi::Error::Success();
  cudaGetLastError();
  return Internal(std::string(op) + ": " + cudaGetErrorName(status) + ": " +
                  cudaGetErrorString(status));
}

}  // namespace jax_moe_ep

#define JAX_MOE_EP_RETURN_IF_ERROR(expression)                   \
  if (::xla::ffi::Error error = (expression); error.failure()) { \
    return error;                                                \
  }

// Where the error is no single op's.
#define JAX_MOE_EP_RETURN_IF_CUDA_ERROR(expression) \
  JAX_MOE_EP_RETURN_IF_ERROR(::jax_moe_ep::ToFfiError("jax_moe_ep", (expression)))

#endif  // JAX_MOE_EP_CHECKS_H_
