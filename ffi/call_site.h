// What a custom call of a group keeps between executions, its options, and the stages before
// Execute.

#ifndef JAX_MOE_EP_CALL_SITE_H_
#define JAX_MOE_EP_CALL_SITE_H_

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "arena.h"
#include "checks.h"
#include "layout.h"
#include "xla/ffi/api/collectives_api.h"

namespace jax_moe_ep {

// XLA's communicators. A runtime with a newer minor version has the same two calls first.
using CommunicatorContext = ffi::internal::CommunicatorContextBase<ffi::internal::ErrorPolicy>;
struct Collectives : ffi::internal::CollectivesExtensionBase<CommunicatorContext> {
  static bool Support(int32_t major, int32_t minor) {
    return major == kMajorVersion && minor >= kMinorVersion;
  }
};

// The attributes of a call. Known when it is traced, equal on all ranks.
struct GroupAttributes {
  int64_t op;                       // Op
  ffi::Span<const int64_t> groups;  // [number of groups, num_ranks] flattened device ids
  int64_t num_ranks;
  int64_t num_tokens;
  int64_t top_k;
  int64_t row_bytes;  // the longest row of a pytree
  int64_t alignment;
  int64_t capacity;
  int64_t num_sms;
  int64_t timeout_ns;
  int64_t options_hash;
  bool has_weights;
  bool zero_tail;
  bool force_vector;
  bool force_staged;

  // For its longest rows.
  RegionLayout Layout(bool is_one_process) const { return Layout(is_one_process, row_bytes); }
  RegionLayout Layout(bool is_one_process, int64_t row_bytes) const {
    return {static_cast<Op>(op),
            is_one_process && !force_staged,
            has_weights,
            static_cast<int>(num_ranks),
            num_tokens,
            top_k,
            row_bytes};
  }
};

// The launch counters of one call site on each device of this process.
class CallSite {
 public:
  static ffi::TypeId id;
  ~CallSite();
  cudaError_t Prepare(int device);
  LaunchState* launch(int device);

 private:
  std::mutex mutex_;
  std::map<int, LaunchState*> launches_;
};

// Prepare: asks XLA for the communicators of all groups.
ffi::Error RequestGroup(CommunicatorContext& context, const GroupAttributes& attributes);

// Initialize: the sticky error of the group; memory, kernels and counters where they are missing;
// the sticky error of any other group.
ffi::Error InitializeGroup(CommunicatorContext& context,
                           CallSite* site,
                           ffi::ScratchAllocator& allocator,
                           const GroupAttributes& attributes);

// This rank's, in any stage after Prepare.
ffi::ErrorOr<Arena*> GetArena(CommunicatorContext& context, const GroupAttributes& attributes);

// Execute: the view of a launch that moves rows of row_bytes.
ffi::ErrorOr<GroupView> MakeView(const Arena& arena,
                                 CallSite* site,
                                 const GroupAttributes& attributes,
                                 int64_t row_bytes);

}  // namespace jax_moe_ep

// The members of GroupAttributes, for structs that begin with them.
#define JAX_MOE_EP_GROUP_MEMBERS                                                                   \
  ::xla::ffi::StructMember<int64_t>("op"),                                                         \
      ::xla::ffi::StructMember<::xla::ffi::Span<const int64_t>>("groups"),                         \
      ::xla::ffi::StructMember<int64_t>("num_ranks"),                                              \
      ::xla::ffi::StructMember<int64_t>("num_tokens"), ::xla::ffi::StructMember<int64_t>("top_k"), \
      ::xla::ffi::StructMember<int64_t>("row_bytes"),                                              \
      ::xla::ffi::StructMember<int64_t>("alignment"),                                              \
      ::xla::ffi::StructMember<int64_t>("capacity"), ::xla::ffi::StructMember<int64_t>("num_sms"), \
      ::xla::ffi::StructMember<int64_t>("timeout_ns"),                                             \
      ::xla::ffi::StructMember<int64_t>("options_hash"),                                           \
      ::xla::ffi::StructMember<bool>("has_weights"), ::xla::ffi::StructMember<bool>("zero_tail"),  \
      ::xla::ffi::StructMember<bool>("force_vector"),                                              \
      ::xla::ffi::StructMember<bool>("force_staged")

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(::jax_moe_ep::GroupAttributes, JAX_MOE_EP_GROUP_MEMBERS);

#endif  // JAX_MOE_EP_CALL_SITE_H_
