#include "meeting.h"

namespace jax_moe_ep {
namespace {

struct ProveParams {
  uint64_t* proofs[kMaxRanks];  // of each rank's memory
  uint64_t nonces[kMaxRanks];
  int num_ranks;
  int rank;
  uint32_t* unread;
};

// A thread a peer: reads the word that the peer wrote into its own memory, and writes this rank's
// word there. Launch: one block of kMaxRanks.
__global__ void ProveKernel(const __grid_constant__ ProveParams p) {
  int peer = threadIdx.x;
  if (peer >= p.num_ranks || peer == p.rank) return;
  volatile uint64_t* proof = p.proofs[peer];
  if (proof[peer] != p.nonces[peer]) atomicOr(p.unread, 1u << peer);
  proof[p.rank] = p.nonces[p.rank];
  __threadfence_system();
}

}  // namespace

cudaError_t LaunchProve(const SharedMemory& shared,
                        const uint64_t* nonces,
                        int num_ranks,
                        int rank,
                        uint32_t* unread,
                        cudaStream_t stream) {
  ProveParams params{};
  for (int peer = 0; peer < num_ranks; ++peer) {
    params.proofs[peer] = reinterpret_cast<uint64_t*>(shared.addresses[peer]);
    params.nonces[peer] = nonces[peer];
  }
  params.num_ranks = num_ranks;
  params.rank = rank;
  params.unread = unread;
  ProveKernel<<<1, kMaxRanks, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace jax_moe_ep
