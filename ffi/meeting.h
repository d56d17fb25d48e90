// How the ranks of a group meet: they tell each other what they have, agree whether all is well,
// and share memory.

#ifndef JAX_MOE_EP_MEETING_H_
#define JAX_MOE_EP_MEETING_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <vector>

#include "checks.h"
#include "exchange.h"
#include "layout.h"

namespace jax_moe_ep {

// Memory that every rank of a group has allocated and all have mapped.
struct SharedMemory {
  int64_t bytes = 0;
  char* addresses[kMaxRanks] = {};  // of each rank's part, as mapped here
};

// Who a rank's peers are, as the first Share finds out.
struct Peers {
  bool is_one_process = false;
  int devices[kMaxRanks] = {};
  const Failure* failures[kMaxRanks] = {};  // of the ranks in this process
};

// One rank's side. Every call must be made by all ranks, in the same order; what goes wrong on one
// of them is an error on all. Each blocks the host for at most timeout_ns.
class Meeting {
 public:
  // As Exchange::Start.
  ffi::Error Start(NcclComm* comm, int device);

  // The same error on all ranks when one of them has a problem; empty: none.
  ffi::Error Agree(const std::string& problem, uint64_t timeout_ns);

  // Allocates, tells the peers, maps theirs, and proves that each can be read and written.
  // `problem` stands for what tests let go wrong: out_of_memory or no_peer_access.
  ffi::Error Share(int64_t bytes,
                   const Failure* failure,
                   const std::string& problem,
                   uint64_t timeout_ns,
                   SharedMemory* shared,
                   Peers* peers);

  Exchange& exchange() { return exchange_; }
  int num_ranks() const { return exchange_.num_ranks(); }
  int rank() const { return exchange_.rank(); }
  cudaStream_t stream() const { return exchange_.stream(); }

 private:
  struct Hello;
  std::string Allocate(bool may_allocate, Hello* mine);
  std::string MapPeers(const std::vector<Hello>& all, SharedMemory* shared, Peers* peers);
  std::string MapPeer(const Hello& hello, const Hello& mine, char** address);
  std::string Prove(const std::vector<Hello>& all, const SharedMemory& shared);
  std::string CheckProof(const std::vector<Hello>& all, const char* own);
  void Release(const std::vector<Hello>& all, uint64_t timeout_ns, SharedMemory* shared);

  Exchange exchange_;
  uint32_t* unread_ = nullptr;  // device
};

// Reads the peers' first words and writes the second: proof[p] of `mine` is nonces[p] on return
// when rank p did the same. Sets bit p of *unread when rank p's word was another.
cudaError_t LaunchProve(const SharedMemory& shared,
                        const uint64_t* nonces,
                        int num_ranks,
                        int rank,
                        uint32_t* unread,
                        cudaStream_t stream);

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_MEETING_H_
