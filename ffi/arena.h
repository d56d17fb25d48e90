// One rank's memory that its group shares: how the ranks meet, what they map, how failures are
// told.
//
// All of it happens in XLA's Initialize stage, before anything of an execution is launched. Whether
// ranks meet depends only on values that are equal on all of them, and what goes wrong on one of
// them is told to all, so that all fail alike and none waits for one that has left.

#ifndef JAX_MOE_EP_ARENA_H_
#define JAX_MOE_EP_ARENA_H_

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "checks.h"
#include "layout.h"
#include "meeting.h"
#include "pool.h"

namespace jax_moe_ep {

// Gives a few bytes of XLA's, or null; asked for when ranks of several processes meet.
using AllocateScratch = std::function<const void*()>;

class Arena {
 public:
  // This process's arena of a communicator on the current device. It lives as long as the process:
  // CUDA graphs hold its addresses.
  static Arena* Get(NcclComm* comm);

  // An error if a call of this group has failed since the last reset, on any rank in this process.
  ffi::Error CheckFailure() const;

  // The same of any group of this process: XLA lets all of its devices begin an execution together,
  // those of another group would wait for the failed ones. Not before a meeting, to which the peers
  // in other processes come.
  static ffi::Error CheckOthers();

  // Meets the peers unless all is there: the first time, after a reset, and once for each size
  // class of regions. Blocks the host until all ranks have come. With a region, peers in other
  // processes get to read XLA's pool, where that can be.
  ffi::Error Ensure(int64_t half_bytes, const AllocateScratch& allocate, uint64_t timeout_ns);

  // Whether all ranks are in this process; false before they have met.
  bool is_one_process() const { return peers_.is_one_process; }

  // The view of a kernel whose call needs regions with halves of half_bytes.
  GroupView View(int64_t half_bytes) const;

  // Writes where each peer reads what the call gives them in place; nothing where it must be
  // staged, as in groups of several processes for what the peers have not mapped. In those of one
  // it is an error when peers cannot read it; `what` names it. Cheap and legal in every Execute,
  // also while a stream is captured.
  ffi::Error Publish(const char* what, const void* address, int64_t bytes, GroupView* view);

  // For Python, about all arenas of this process.
  static std::vector<std::string> Failures();  // first those who gave up themselves
  static void Reset();                         // waits for the devices; the next Ensure meets again
  static std::vector<std::map<std::string, int64_t>> List();

  // For tests.
  static void SetFault(int device, Fault fault);
  static void SetEpoch(uint64_t epoch);
  static void FailNextMeeting(int device, std::string reason);

 private:
  Arena(NcclComm* comm, int device) : comm_(comm), device_(device) {}

  ffi::Error Meet(uint64_t timeout_ns);
  ffi::Error Restart(uint64_t timeout_ns);
  ffi::Error Share(int64_t bytes, uint64_t timeout_ns, SharedMemory* shared);
  ffi::Error CheckPeersCanRead(const char* what, const void* address) const;
  template <typename Write>
  static void ForEach(Write write);
  int num_ranks() const { return meeting_.num_ranks(); }
  int rank() const { return meeting_.rank(); }
  Control* own_control() const { return reinterpret_cast<Control*>(control_.addresses[rank()]); }

  NcclComm* comm_;
  int device_;
  Meeting meeting_;
  Peers peers_;
  int64_t generation_ = 0;      // of resets
  Failure* failure_ = nullptr;  // mapped host memory
  SharedMemory control_;
  std::map<int64_t, SharedMemory> regions_;  // by half_bytes
  std::vector<SharedPool> pools_;            // of groups of several processes
  std::atomic<int64_t> num_in_place_{0};     // calls of Execute whose x is read in place
};

// The halves of the size class that holds `bytes`: a power of two, or 0.
int64_t HalfBytes(int64_t bytes);

// Device memory of an arena with one class of regions.
int64_t ArenaBytes(int64_t half_bytes);

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_ARENA_H_
