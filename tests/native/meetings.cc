// How ranks meet, on GPUs made of threads (fake_gpus.cc): one scenario, named by the argument,
// whose outcome is printed for test_meeting.py.

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "arena.h"
#include "fake_gpus.h"
#include "mailbox.h"

namespace jax_moe_ep {
namespace {

constexpr uint64_t kPatience = 20'000'000'000;
constexpr uint64_t kImpatience = 200'000'000;
constexpr int64_t kMiB = 1 << 20;

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
    return Run(everyone(), [=](Arena* arena) { return arena->Ensure(half_bytes, {}, patience); });
  }

  Arena* ArenaOf(int rank) const {
    fake::SetDevice(rank);
    return Arena::Get(comms[rank]);
  }

  GroupView View(int rank, int64_t half_bytes = 0) const { return ArenaOf(rank)->View(half_bytes); }
};

void Print(const char* what, const std::vector<std::string>& texts) {
  for (size_t rank = 0; rank < texts.size(); ++rank) {
    printf("%s, rank %zu: %s\n", what, rank, texts[rank].c_str());
  }
}

void PrintViews(const Group& group, int64_t half_bytes) {
  bool is_shared = true, is_own = true, has_regions = true;
  for (int rank : group.everyone()) {
    GroupView view = group.View(rank, half_bytes), first = group.View(0, half_bytes);
    is_own &= view.rank == rank && group.ArenaOf(rank)->is_one_process();
    for (int peer : group.everyone()) {
      is_shared &= view.controls[peer] == first.controls[peer] && view.controls[peer] != nullptr;
      for (int other : group.everyone()) {
        is_shared &= peer == other || view.controls[peer] != view.controls[other];
      }
      has_regions &= view.regions[peer] != nullptr && view.regions[peer] == first.regions[peer];
    }
  }
  printf("views: shared %d own %d regions %d\n", is_shared, is_own, has_regions);
}

void Meets(int num_ranks) {
  Group group(num_ranks);
  Print("meet", group.Meet());
  size_t before = fake::NumAllocations();
  Print("again", group.Meet());
  printf("allocated again: %zu\n", fake::NumAllocations() - before);
  Print("region", group.Meet(kMiB));
  printf("allocated for regions: %zu\n", fake::NumAllocations() - before);
  Print("region again", group.Meet(kMiB));
  Print("larger region", group.Meet(4 * kMiB));
  printf("allocated for two classes: %zu\n", fake::NumAllocations() - before);
  PrintViews(group, kMiB);
  PrintViews(group, 4 * kMiB);
}

// `spoil` makes a meeting fail, `mend` takes it back. Nothing of the failed one is left.
void Fails(int num_ranks, std::function<void()> spoil, std::function<void()> mend) {
  Group group(num_ranks);
  spoil();
  Print("spoilt", group.Meet());
  size_t before = fake::NumAllocations();
  spoil();
  Print("spoilt again", group.Meet());
  printf("left behind: %zu\n", fake::NumAllocations() - before);
  mend();
  Print("mended", group.Meet());
  spoil();
  Print("region spoilt", group.Meet(kMiB));
  mend();
  Print("region mended", group.Meet(kMiB));
  PrintViews(group, kMiB);
}

void OneStaysAway() {
  Group group(3);
  Print("alone", group.Run({0, 2}, [](Arena* arena) { return arena->Ensure(0, {}, kImpatience); }));
  Print("later", group.Run({0, 2}, [](Arena* arena) { return arena->Ensure(0, {}, kImpatience); }));
}

void Resets() {
  Group group(2), other(2);
  Print("meet", group.Meet());
  Print("other", other.Meet());
  GroupView view = group.View(1);
  view.controls[1]->turn = 2 * 7;
  view.controls[1]->abort = 2;
  view.failure->kind = FailureKind::kTimeout;
  view.failure->rank = 1;
  auto check = [](Arena* arena) { return arena->CheckFailure(); };
  Print("failed", group.Run(group.everyone(), check));
  Print("other", other.Run(other.everyone(), check));
  Print("others", other.Run(other.everyone(), [](Arena*) { return Arena::CheckOthers(); }));
  printf("failures: %zu\n", Arena::Failures().size());
  Arena::Reset();
  printf("after reset: %zu\n", Arena::Failures().size());
  Print("restarted", group.Meet());
  Print("checked", group.Run(group.everyone(), check));
  printf("epoch %d abort %d\n",
         static_cast<int>(view.controls[1]->turn / 2),
         static_cast<int>(view.controls[1]->abort));
  Print("other restarted", other.Meet());
  view.failure->kind = FailureKind::kTimeout;
  Print("failed again", group.Run(group.everyone(), check));
}

// Three groups: a rank that gave up and one that stopped because of it; one that only stopped; no
// failure.
void Tells() {
  Group first(2), second(3), third(4);
  auto fail = [](const Group& group, int rank, FailureKind kind) {
    Failure* failure = group.View(rank).failure;
    failure->rank = rank;
    failure->kind = kind;
  };
  auto check = [](const char* what, const Group& group) {
    Print(what, group.Run(group.everyone(), [](Arena* arena) {  // as InitializeGroup does
      ffi::Error own = arena->CheckFailure();
      return own.success() ? Arena::CheckOthers() : own;
    }));
  };
  for (const Group* group : {&first, &second, &third}) Print("meet", group->Meet());
  fail(first, 0, FailureKind::kPeer);
  fail(first, 1, FailureKind::kTimeout);
  fail(second, 2, FailureKind::kPeer);
  check("first", first);
  check("second", second);
  check("third", third);
  printf("failures: %zu\n", Arena::Failures().size());
  Arena::Reset();
  check("reset", first);
}

// Of every rank: an allocation, the middle of it, and memory that no peer maps.
void ReadsInPlace(int num_ranks) {
  Group group(num_ranks);
  Print("meet", group.Meet());
  static char of_a_module;
  auto read = [&](const char* what, auto address) {
    Print(what, group.Run(group.everyone(), [&](Arena* arena) {
      GroupView view = arena->View(0);
      ffi::Error error = arena->Publish("x", address(arena), &view);
      int device = -1;
      cudaGetDevice(&device);
      for (int peer = 0; error.success() && peer < view.num_ranks; ++peer) {
        if (view.published[peer] != address(arena)) return ffi::Error::Internal("another address");
      }
      return device == view.rank ? error : ffi::Error::Internal("another device");
    }));
  };
  auto control = [](Arena* arena) {
    GroupView view = arena->View(0);
    return reinterpret_cast<char*>(view.controls[view.rank]);
  };
  read("start", control);
  read("middle", [&](Arena* arena) { return control(arena) + 100; });
  read("module", [&](Arena*) { return &of_a_module; });
}

// What a rank's peers read of an address of its pool: "in place" when each, by the address that is
// published for it, finds what the rank writes there; "staged" when none is published.
std::string Read(Arena* arena, char* address) {
  GroupView view = arena->View(0);
  ffi::Error error = arena->Publish("x", address, &view);
  if (error.failure()) return error.message();
  if (!view.is_read_in_place()) return "staged";
  bool is_right = true, is_mapped = false;
  for (char written : {'a', 'b'}) {
    *address = written;
    for (int rank = 0; rank < view.num_ranks; ++rank) {
      is_right &= *view.published[rank] == written;
      is_mapped |= view.published[rank] != address;
    }
  }
  if (!is_right) return "something else";
  return is_mapped ? "in place" : "at the same address";
}

// Ranks of several processes with a pool each, in which their buffers are. `spoil` is done by
// every rank before the region is made.
void SharesPools(const std::vector<int>& processes, int64_t buffer_bytes, void (*spoil)(int rank)) {
  constexpr int64_t kPoolBytes = 8 * kMiB;
  int num_ranks = static_cast<int>(processes.size());
  Group group(num_ranks, processes);
  std::vector<char*> pools, later;
  for (int rank = 0; rank < num_ranks; ++rank) pools.push_back(fake::NewPool(kPoolBytes));
  auto ensure = [&](int64_t half_bytes, const std::vector<char*>& from) {
    return group.Run(group.everyone(), [&, half_bytes](Arena* arena) {
      JAX_MOE_EP_RETURN_IF_ERROR(arena->Ensure(0, {}, kPatience));
      int rank = arena->View(0).rank;
      spoil(rank);
      return arena->Ensure(half_bytes, {from[rank], buffer_bytes}, kPatience);
    });
  };
  auto read = [&](const char* what, const std::vector<char*>& from, int64_t offset) {
    Print(what, group.Run(group.everyone(), [&, offset](Arena* arena) {
      return ffi::Error::Internal(Read(arena, from[arena->View(0).rank] + offset));
    }));
  };
  Print("region", ensure(kMiB, pools));
  printf("mappings: %d\n", fake::NumMappings());
  read("first", pools, 0);
  read("last", pools, kPoolBytes - 1);
  Print("larger region", ensure(2 * kMiB, pools));
  printf("mappings after the same again: %d\n", fake::NumMappings());
  for (int rank = 0; rank < num_ranks; ++rank) later.push_back(fake::NewPool(kPoolBytes));
  read("unknown", later, 0);
  Print("largest region", ensure(4 * kMiB, later));
  read("later", later, 100);
  read("earlier", pools, 100);
  std::vector<char*> others{later[0]};  // new ones, but for rank 0
  for (int rank = 1; rank < num_ranks; ++rank) others.push_back(fake::NewPool(kPoolBytes));
  Print("last region", ensure(8 * kMiB, others));
  read("others", others, 100);
  for (char* pool : pools) fake::Reallocate(pool);
  read("reallocated", pools, 100);
}

// Sends a descriptor of its own, with any rank's name, to every mailbox that it finds.
struct Stranger {
  std::atomic<bool> is_over{false};
  int num_letters = 0;
  std::thread thread{[this] { Run(); }};

  void Run() {
    Mailbox own(12345);
    int file = memfd_create("strange", MFD_CLOEXEC);
    if (ftruncate(file, 8 * kMiB) != 0) return;
    std::set<uint64_t> known{12345};
    while (!is_over) {
      std::ifstream sockets("/proc/net/unix");
      for (std::string line; std::getline(sockets, line);) {
        size_t name = line.find("@jax_moe_ep-");
        if (name == std::string::npos) continue;
        uint64_t to = std::stoull(line.substr(name + 12), nullptr, 16);
        if (!known.insert(to).second) continue;
        for (int rank = 0; rank < 3; ++rank) num_letters += own.Send(to, {rank, 1}, file);
      }
    }
    close(file);
  }
};

void SharesPools(const std::string& name, int num_ranks) {
  std::vector<int> apart, in_pairs;
  for (int rank = 0; rank < num_ranks; ++rank) {
    apart.push_back(1 + rank);
    in_pairs.push_back(1 + rank / 2);
  }
  auto nothing = [](int) {};
  if (name == "pools") return SharesPools(apart, kMiB, nothing);
  if (name == "pools_in_pairs") return SharesPools(in_pairs, kMiB, nothing);
  if (name == "pools_of_one_buffer") return SharesPools(apart, 8 * kMiB, nothing);
  if (name == "pools_not_exported") {
    return SharesPools(apart, kMiB, [](int rank) { fake::can_export = rank != 1; });
  }
  if (name == "pools_not_mapped") {
    return SharesPools(apart, kMiB, [](int rank) { fake::can_map = rank != 1; });
  }
  if (name == "pools_and_a_stranger") {  // who has time while the last rank is slow
    Stranger stranger;
    SharesPools(apart, kMiB, [](int rank) { fake::is_slow = rank == 2; });
    stranger.is_over = true;
    stranger.thread.join();
    printf("letters: %d\n", stranger.num_letters);
    return;
  }
  printf("no scenario %s\n", name.c_str());
}

void Run(const std::string& name, int num_ranks) {
  auto nothing = [] {};
  if (name == "meets") return Meets(num_ranks);
  if (name == "out_of_memory" || name == "no_peer_access") {
    return Fails(num_ranks, [&] { Arena::FailNextMeeting(1, name); }, nothing);
  }
  if (name == "apart") {
    return Fails(
        num_ranks, [] { fake::can_access_peers = false; }, [] { fake::can_access_peers = true; });
  }
  if (name == "blind") {
    return Fails(num_ranks, [] { fake::is_blind = true; }, [] { fake::is_blind = false; });
  }
  if (name == "one_stays_away") return OneStaysAway();
  if (name == "resets") return Resets();
  if (name == "tells") return Tells();
  if (name == "reads_in_place") return ReadsInPlace(num_ranks);
  SharesPools(name, num_ranks);
}

}  // namespace
}  // namespace jax_moe_ep

int main(int argc, char** argv) {
  jax_moe_ep::Run(argv[1], argc > 2 ? atoi(argv[2]) : 2);
  return 0;
}
