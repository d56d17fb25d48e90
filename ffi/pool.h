// XLA's memory pool, as the ranks of other processes read it.
//
// XLA allocates device memory in few large pieces, which the driver can pass to other processes as
// file descriptors. A rank whose peers have mapped the piece that holds its tokens need not copy
// them to its arena first.

#ifndef JAX_MOE_EP_POOL_H_
#define JAX_MOE_EP_POOL_H_

#include <cstdint>

#include "checks.h"
#include "exchange.h"
#include "layout.h"

namespace jax_moe_ep {

// One allocation of this GPU's memory.
struct XlaPool {
  char* base = nullptr;
  int64_t bytes = 0;
  uint64_t id = 0;  // of the driver: another allocation at the same address has another

  // The one that holds an address; without bytes when the driver knows none.
  static XlaPool Find(const void* address);

  // Whether the address is in this allocation, which still exists. Legal while a stream is
  // captured.
  bool Holds(const void* address) const;
};

// The pools that ranks have offered each other at once, and what became of this rank's.
struct SharedPool {
  XlaPool pool;                        // shared with all peers, or without bytes
  uint64_t ids[kMaxRanks] = {};        // of all ranks' pools; 0: none
  const char* mapped[kMaxRanks] = {};  // where each peer has this rank's

  // Writes where each rank reads the address. False when not all of them can.
  bool Publish(const void* address, int num_ranks, const char** published) const;
};

// All ranks, in the same order: each offers the allocation that holds `bytes` bytes at its address,
// unless that is all it holds, and maps those of the others; same-process peers read each other
// anyway. What is not among `pools` yet is added to them. What cannot be shared is no error. Blocks
// the host; an error is that of an exchange.
ffi::Error SharePool(Exchange& exchange,
                     const void* address,
                     int64_t bytes,
                     uint64_t timeout_ns,
                     std::vector<SharedPool>* pools);

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_POOL_H_
