// Numbers that cross between ranks in words with a tag of their call above them: who finds the tag
// has the number, and needs no flag nor a fence before it.

#ifndef JAX_MOE_EP_TAGGED_WORDS_CUH_
#define JAX_MOE_EP_TAGGED_WORDS_CUH_

#include "signal.cuh"

namespace jax_moe_ep {

// Some of the words of a call that a thread waits for: `count` of them, `stride` apart.
struct AwaitedWords {
  const uint64_t* first;
  int count;
  int stride;
  uint64_t tag;
  uint64_t mask;

  __device__ bool HaveCome() const {
    bool all = true;
    for (int i = 0; i < count; ++i) all &= (LoadRelaxedSystem(&first[i * stride]) & ~mask) == tag;
    return all;
  }
};

// Words of one call, each with a number of kBits bits. Tags count calls, modulo 2^(64 - kBits);
// where ranks may be in different calls, from where the hash of the signature says. Calls of one
// signature have different tags; those of two signatures too, but for one chance in 2^(64 - kBits).
template <int kBits>
struct TaggedWords {
  static constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1;
  uint64_t tag;

  __device__ explicit TaggedWords(uint64_t call) : tag(call << kBits) {}
  __device__ TaggedWords(const GroupView& group, uint64_t epoch)
      : TaggedWords(group.hash + epoch) {}

  __device__ uint64_t Make(uint64_t number) const { return tag | (number & kMask); }
  __device__ bool Has(uint64_t word) const { return (word & ~kMask) == tag; }
  __device__ AwaitedWords At(const uint64_t* first, int count, int stride = 1) const {
    return {first, count, stride, tag, kMask};
  }
  __device__ static uint64_t Number(uint64_t word) { return word & kMask; }
};

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_TAGGED_WORDS_CUH_
