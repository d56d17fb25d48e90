// How ranks meet, on GPUs made of threads (fake_gpus.cc): one scenario, named by the argument,
// whose outcome is printed for test_meeting.py.
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "ranks.h"

namespace jax_moe_ep {
namespace {

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

// The meeting's error; another one if CUDA's was left behind, as the next launch would find it.
ffi::Error MeetImpatiently(Arena* arena) {
  ffi::Error error = arena->Ensure(0, AllocateNothing, kImpatience);
  return cudaGetLastError() == cudaSuccess ? error : ffi::Error::Internal("an error is left");
}

void OneStaysAway() {
  Group group(3);
  Print("alone", group.Run({0, 2}, MeetImpatiently));
  Print("later", group.Run({0, 2}, [](Arena* arena) {
    return arena->Ensure(0, AllocateNothing, kImpatience);
  }));
}

void LacksMemoryAtFirst() {
  Group group(2);
  fake::is_full = true;
  Print("full", group.Run(group.everyone(), MeetImpatiently));
  fake::is_full = false;
  Print("mended", group.Run(group.everyone(), MeetImpatiently));
}

void DoesNotBlock() {
  Group group(2);
  fake::nccl_result = kNcclInProgress;
  Print("meet", group.Meet());
  fake::nccl_result = kNcclSuccess;
  Print("later", group.Meet());
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
  if (name == "lacks_memory_at_first") return LacksMemoryAtFirst();
  if (name == "does_not_block") return DoesNotBlock();
  if (name == "resets") return Resets();
  if (name == "tells") return Tells();
  if (name == "reads_in_place") return ReadsInPlace(num_ranks);
  printf("no scenario %s\n", name.c_str());
}

}  // namespace
}  // namespace jax_moe_ep

int main(int argc, char** argv) {
  jax_moe_ep::Run(argv[1], argc > 2 ? atoi(argv[2]) : 2);
  return 0;
}
