// A group whose ranks are threads, for the programs that let them meet.

#ifndef JAX_MOE_EP_TESTS_RANKS_H_
#define JAX_MOE_EP_TESTS_RANKS_H_

#include <cstdio>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "arena.h"
#include "fake_gpus.h"

namespace jax_moe_ep {

inline constexpr uint64_t kPatience = 20'000'000'000;
inline constexpr uint64_t kImpatience = 200'000'000;
inline constexpr int64_t kMiB = 1 << 20;

inline const void* AllocateNothing() { return nullptr; }

struct Group {
  std::vector<NcclComm*> comms;
  std::vector<int> processes;  // of the ranks; empty: one for all

  explicit Group(int num_ranks, std::vector<int> processes = {})
      : comms(fake::NewGroup(num_ranks)), processes(processes) {}

  // What each rank of `ranks` gets from act(arena), at the same time.
  std::vector<std::string> Run(std::vector<int> ranks,
                               std::function<ffi::Error(Arena*)> act) const {
    std::vector<std::string> texts(comms.size(), "absent");
    std::vector<std::thread> threads;
    for (int rank : ranks) {
      threads.emplace_back([&, rank] {
        fake::SetDevice(rank);
        if (!processes.empty()) fake::SetProcess(processes[rank]);
        ffi::Error error = act(Arena::Get(comms[rank]));
        texts[rank] = error.success() ? "fine" : error.message();
      });
    }
    for (std::thread& thread : threads) thread.join();
    return texts;
  }

  std::vector<int> everyone() const {
    std::vector<int> ranks;
    for (size_t rank = 0; rank < comms.size(); ++rank) ranks.push_back(static_cast<int>(rank));
    return ranks;
  }

  std::vector<std::string> Meet(int64_t half_bytes = 0, uint64_t patience = kPatience) const {
    return Run(everyone(),
               [=](Arena* arena) { return arena->Ensure(half_bytes, AllocateNothing, patience); });
  }

  Arena* ArenaOf(int rank) const {
    fake::SetDevice(rank);
    return Arena::Get(comms[rank]);
  }

  GroupView View(int rank, int64_t half_bytes = 0) const { return ArenaOf(rank)->View(half_bytes); }
};

inline void Print(const char* what, const std::vector<std::string>& texts) {
  for (size_t rank = 0; rank < texts.size(); ++rank) {
    printf("%s, rank %zu: %s\n", what, rank, texts[rank].c_str());
  }
}

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_TESTS_RANKS_H_
