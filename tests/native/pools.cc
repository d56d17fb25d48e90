// How ranks of several processes share XLA's pools, on GPUs made of threads (fake_gpus.cc) and a
// driver made of files (fake_driver.cc): one scenario, named by the argument, whose outcome is
// printed for test_pool.py.

#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>

#include "mailbox.h"
#include "ranks.h"

namespace jax_moe_ep {
namespace {

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
  std::filesystem::directory_iterator descriptors("/proc/self/fd");
  return static_cast<int>(std::distance(begin(descriptors), end(descriptors)));
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

void Run(const std::string& name, int num_ranks) {
  Pools way;
  for (int rank = 0; rank < num_ranks; ++rank) way.processes.push_back(1 + rank);
  if (name == "all") return Share(way);
  if (name == "halves" || name == "by_turns") {  // two processes
    for (int rank = 0; rank < num_ranks; ++rank) {
      way.processes[rank] = 1 + (name == "halves" ? 2 * rank / num_ranks : rank % 2);
    }
    return Share(way);
  }
  if (name == "one_array") {
    way.has_pool = false;
    return Share(way);
  }
  if (name == "not_exported") {
    way.spoil = [](int rank) { fake::can_export = rank % 2 == 0; };
    return Share(way);
  }
  if (name == "not_mapped") {
    way.spoil = [](int rank) { fake::can_map = rank != 1; };
    return Share(way);
  }
  if (name == "not_sent") {  // the letters of rank 1 get lost
    way.patience = 2'000'000'000;
    way.spoil = [](int rank) { fake::exports_nothing = rank == 1; };
    return Share(way);
  }
  if (name == "a_stranger") {  // who has time while the last rank is slow
    Stranger stranger;
    way.spoil = [](int rank) { fake::is_slow_to_export = rank == 2; };
    Share(way);
    stranger.is_over = true;
    stranger.thread.join();
    printf("letters: %d\n", stranger.num_letters);
    printf("descriptors beside pools: %d\n", NumDescriptors() - fake::NumPools());
    return;
  }
  if (name == "interrupted") {
    way.spoil = [](int rank) {
      fake::is_slow_to_import = rank == 1;
      Interrupt();
    };
    return Share(way);
  }
  printf("no scenario %s\n", name.c_str());
}

}  // namespace
}  // namespace jax_moe_ep

int main(int argc, char** argv) {
  jax_moe_ep::Run(argv[1], argc > 2 ? atoi(argv[2]) : 2);
  return 0;
}
