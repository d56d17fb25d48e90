// What the handlers of the row ops share: their plan arguments, attributes and checks.

#ifndef JAX_MOE_EP_ROWS_FFI_H_
#define JAX_MOE_EP_ROWS_FFI_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "checks.h"
#include "combine.h"
#include "rows.h"

namespace jax_moe_ep {

using Slots = ffi::Buffer<ffi::S32, 2>;
using Groups = ffi::Buffer<ffi::S32, 1>;
using TokenWeights = ffi::Buffer<ffi::F32, 2>;

// slots, group_counts, group_sizes, group_starts.
template <typename Binding>
auto BindPlan(Binding binding) {
  return std::move(binding)
      .template Arg<Slots>()
      .template Arg<Groups>()
      .template Arg<Groups>()
      .template Arg<Groups>();
}

template <typename Binding>
auto BindPlanAttributes(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("alignment")
      .template Attr<int64_t>("capacity")
      .template Attr<bool>("zero_tail")
      .template Attr<int64_t>("num_sms")
      .template Attr<bool>("force_vector");
}

// Elements behind the first dimension.
template <typename Buffer>
int64_t RowElements(const Buffer& buffer) {
  int64_t elements = 1;
  for (size_t i = 1; i < buffer.dimensions().size(); ++i) elements *= buffer.dimensions()[i];
  return elements;
}

inline ffi::Error MakeRowsPlan(const char* op,
                               const Slots& slots,
                               const Groups& group_counts,
                               const Groups& group_sizes,
                               const Groups& group_starts,
                               int64_t alignment,
                               int64_t capacity,
                               bool zero_tail,
                               RowsPlan* plan,
                               int64_t num_ranks = 1) {
  int64_t num_groups = group_counts.dimensions()[0];
  JAX_MOE_EP_RETURN_IF_ERROR(CheckDims(op, "group_sizes", group_sizes, {num_groups}));
  JAX_MOE_EP_RETURN_IF_ERROR(CheckDims(op, "group_starts", group_starts, {num_groups}));
  *plan = {slots.typed_data(),
           group_counts.typed_data(),
           group_sizes.typed_data(),
           group_starts.typed_data(),
           slots.dimensions()[0] / num_ranks,
           static_cast<int>(slots.dimensions()[1]),
           static_cast<int>(num_groups),
           static_cast<int>(alignment),
           capacity,
           zero_tail};
  return ffi::Error::Success();
}

// An error unless the buffer is [first, ...] with rows of `row_bytes` and of a type of this width.
inline ffi::Error CheckRows(const char* op,
                            const char* argument,
                            const ffi::AnyBuffer& buffer,
                            int64_t first,
                            int64_t row_bytes) {
  int64_t width = static_cast<int64_t>(ffi::ByteWidth(buffer.element_type()));
  bool is_right = buffer.dimensions().size() > 0 && buffer.dimensions()[0] == first &&
                  RowElements(buffer) * width == row_bytes;
  if (!is_right) {
    return ffi::Error::InvalidArgument(
        std::string(op) + ": " + argument + " must have " + std::to_string(first) + " rows of " +
        std::to_string(row_bytes) + " bytes, got shape " +
        DimsToString(buffer.dimensions().begin(), buffer.dimensions().size()) + " of " +
        std::to_string(width) + "-byte elements");
  }
  if (row_bytes % 16 || reinterpret_cast<uintptr_t>(buffer.untyped_data()) % 16) {
    return ffi::Error::InvalidArgument(
        std::string(op) + ": rows of " + argument +
        " must be a multiple of 16 bytes at addresses that are, got " + std::to_string(row_bytes) +
        " bytes");
  }
  return ffi::Error::Success();
}

inline ffi::Error GetFloatType(const char* op, const ffi::AnyBuffer& y, FloatType* type) {
  switch (y.element_type()) {
    case ffi::F32:
      *type = FloatType::kF32;
      return ffi::Error::Success();
    case ffi::F16:
      *type = FloatType::kF16;
      return ffi::Error::Success();
    case ffi::BF16:
      *type = FloatType::kBF16;
      return ffi::Error::Success();
    default:
      return ffi::Error::InvalidArgument(std::string(op) +
                                         ": y must be float32, float16 or bfloat16");
  }
}

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_ROWS_FFI_H_
