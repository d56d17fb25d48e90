// How ranks meet, on GPUs made of threads (fake_gpus.cc): one scenario, named by the argument,
// whose outcome is printed for test_meeting.py.

#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <filesystem>
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

const void* AllocateNothing() { return nullptr; }

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
  Print("alone", group.Run({0, 2}, [](Arena* arena) {
    return arena->Ensure(0, AllocateNothing, kImpatience);
  }));
  Print("later", group.Run({0, 2}, [](Arena* arena) {
    return arena->Ensure(0, AllocateNothing, kImpatience);
  }));
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
      ffi::Error error = arena->Publish("x", address(arena), 1, &view);
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
std::string Read(Arena* arena, char* address, int64_t bytes) {
  GroupView view = arena->View(0);
  ffi::Error error = arena->Publish("x", address, bytes, &view);
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

constexpr int64_t kPoolBytes = 8 * kMiB;

// How ranks of several processes share pools.
struct Pools {
  std::vector<int> processes;  // of the ranks
  bool has_pool = true;        // else the allocator has an allocation for each array
  uint64_t patience = kPatience;
  std::function<void(int rank)> spoil = [](int) {};  // before a region is made
};

void Share(const Pools& way) {
  int num_ranks = static_cast<int>(way.processes.size());
  Group group(num_ranks, way.processes);
  std::vector<char*> pools, later;
  for (int rank = 0; rank < num_ranks; ++rank) pools.push_back(fake::NewPool(kPoolBytes));
  auto ensure = [&](int64_t half_bytes, const std::vector<char*>& from) {
    return group.Run(group.everyone(), [&, half_bytes](Arena* arena) {
      JAX_MOE_EP_RETURN_IF_ERROR(arena->Ensure(0, AllocateNothing, way.patience));
      int rank = arena->View(0).rank;
      way.spoil(rank);
      auto allocate = [&]() -> const void* {
        return way.has_pool ? from[rank] + 1000 : fake::NewPool(kAllocationBytes);
      };
      return arena->Ensure(half_bytes, allocate, way.patience);
    });
  };
  auto read =
      [&](const char* what, const std::vector<char*>& from, int64_t offset, int64_t bytes = 1) {
        Print(what, group.Run(group.everyone(), [&, offset, bytes](Arena* arena) {
          return ffi::Error::Internal(Read(arena, from[arena->View(0).rank] + offset, bytes));
        }));
      };
  Print("region", ensure(kMiB, pools));
  printf("mappings: %d\n", fake::NumMappings());
  read("first", pools, 0);
  read("last", pools, kPoolBytes - 1);
  read("across the end", pools, kPoolBytes - 1, 2);
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
  printf("mappings in the end: %d\n", fake::NumMappings());
  read("others", others, 100);
  for (char* pool : pools) fake::Reallocate(pool);
  read("reallocated", pools, 100);
}

// Sends two descriptors of its own, with any rank's name, to every mailbox that it finds.
struct Stranger {
  std::atomic<bool> is_over{false};
  int num_letters = 0;
  std::thread thread{[this] { Run(); }};

  void Run() {
    int own = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    int file = memfd_create("strange", MFD_CLOEXEC);
    if (own < 0 || ftruncate(file, kPoolBytes) != 0) return;
    std::set<std::string> known;
    while (!is_over) {
      std::ifstream sockets("/proc/net/unix");
      for (std::string line; std::getline(sockets, line);) {
        size_t at = line.find("@jax_moe_ep-");
        if (at == std::string::npos || !known.insert(line.substr(at)).second) continue;
        for (int rank = 0; rank < 3; ++rank)
          num_letters += Send(own, line.substr(at + 1), rank, file);
      }
    }
    close(file);
    close(own);
  }

  static bool Send(int socket, const std::string& name, int rank, int file) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    memcpy(address.sun_path + 1, name.data(), name.size());
    Letter letter{rank, 1};
    iovec text{&letter, sizeof(letter)};
    alignas(cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))] = {};
    msghdr message{};
    message.msg_name = &address;
    message.msg_namelen = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
    message.msg_iov = &text;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(2 * sizeof(int));
    int files[] = {file, file};
    memcpy(CMSG_DATA(header), files, sizeof(files));
    return sendmsg(socket, &message, MSG_NOSIGNAL) == sizeof(letter);
  }
};

int NumDescriptors() {
  int count = 0;
  for (const auto& each : std::filesystem::directory_iterator("/proc/self/fd")) {
    count += !each.path().empty();
  }
  return count;
}

// From now on this thread handles a signal every 2 ms.
void Interrupt() {
  struct sigaction action{};
  action.sa_handler = [](int) {};
  action.sa_flags = SA_RESTART;
  sigaction(SIGALRM, &action, nullptr);
  sigevent event{};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = SIGALRM;
  event._sigev_un._tid = gettid();
  timer_t timer;
  itimerspec often{{0, 2'000'000}, {0, 2'000'000}};
  if (timer_create(CLOCK_MONOTONIC, &event, &timer) == 0) timer_settime(timer, 0, &often, nullptr);
}

void SharesPools(const std::string& name, int num_ranks) {
  Pools way;
  for (int rank = 0; rank < num_ranks; ++rank) way.processes.push_back(1 + rank);
  if (name == "pools") return Share(way);
  if (name == "pools_of_halves" || name == "pools_by_turns") {  // two processes
    for (int rank = 0; rank < num_ranks; ++rank) {
      way.processes[rank] = 1 + (name == "pools_of_halves" ? 2 * rank / num_ranks : rank % 2);
    }
    return Share(way);
  }
  if (name == "pools_of_one_array") {
    way.has_pool = false;
    return Share(way);
  }
  if (name == "pools_not_exported") {
    way.spoil = [](int rank) { fake::can_export = rank % 2 == 0; };
    return Share(way);
  }
  if (name == "pools_not_mapped") {
    way.spoil = [](int rank) { fake::can_map = rank != 1; };
    return Share(way);
  }
  if (name == "pools_not_sent") {  // the letters of rank 1 get lost
    way.patience = 2'000'000'000;
    way.spoil = [](int rank) { fake::exports_nothing = rank == 1; };
    return Share(way);
  }
  if (name == "pools_and_a_stranger") {  // who has time while the last rank is slow
    Stranger stranger;
    way.spoil = [](int rank) { fake::is_slow_to_export = rank == 2; };
    Share(way);
    stranger.is_over = true;
    stranger.thread.join();
    printf("letters: %d\n", stranger.num_letters);
    printf("descriptors beside pools: %d\n", NumDescriptors() - fake::NumPools());
    return;
  }
  if (name == "pools_interrupted") {
    way.spoil = [](int rank) {
      fake::is_slow_to_import = rank == 1;
      Interrupt();
    };
    return Share(way);
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
