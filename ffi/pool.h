// XLA's memory pool, as the ranks of other processes read it.
//
// XLA's allocator takes device memory in few large pieces, which it keeps, and which the driver can
// pass to other processes as file descriptors. A rank whose peers have mapped the piece that holds
// its tokens need not copy them to its arena first.

#ifndef JAX_MOE_EP_POOL_H_
#define JAX_MOE_EP_POOL_H_

#include <cstdint>
#include <vector>

#include "checks.h"
#include "exchange.h"
#include "layout.h"

namespace jax_moe_ep {

// One allocation of the driver's.
struct XlaPool {
  char* base = nullptr;
  int64_t bytes = 0;
  uint64_t id = 0;  // of the driver: another allocation at the same address has another

  // The one that holds an address; without bytes when the driver knows none.
  static XlaPool Find(const void* address);

  // Whether all of the bytes are in this allocation, which still exists. Legal while a stream is
  // captured.
  bool Holds(const void* address, int64_t bytes) const;
};

// The pools that ranks have offered each other at once.
struct SharedPool {
  XlaPool own;                        // shared with all peers, or without bytes
  const char* there[kMaxRanks] = {};  // where each rank has it mapped
  uint64_t ids[kMaxRanks] = {};       // of all ranks' pools; 0: none
  char* here[kMaxRanks] = {};         // where this rank has them mapped

  // Writes where each rank reads the bytes. False when not all of them can.
  bool Publish(const void* address, int64_t bytes, int num_ranks, const char** published) const;
};

// All ranks, in the same order: each offers the allocation that holds its scratch, a few bytes that
// XLA's allocator has just given, and maps those of the others; ranks of one process read each
// other anyway. What is not among `pools` yet is added to them. What cannot be shared is no error.
// Blocks the host; an error is that of an exchange.
//
// An allocator that has made an allocation for the scratch alone makes one for every array, and may
// put another at its address later: nothing of it is offered.
ffi::Error SharePool(Exchange& exchange,
                     const void* scratch,
                     uint64_t timeout_ns,
                     std::vector<SharedPool>* pools);

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_POOL_H_
