#include "pool.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <iterator>

#include "driver_api.h"
#include "identity.h"
#include "mailbox.h"

namespace jax_moe_ep {
namespace {

constexpr auto kDescriptor = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

CUdeviceptr DevicePointer(const void* address) { return reinterpret_cast<CUdeviceptr>(address); }

// The driver's number of an allocation, or 0.
uint64_t AllocationId(const DriverApi& driver, const void* address) {
  unsigned long long id = 0;
  CUresult status =
      driver.pointer_get_attribute(&id, CU_POINTER_ATTRIBUTE_BUFFER_ID, DevicePointer(address));
  return status == CUDA_SUCCESS ? id : 0;
}

// A file descriptor, closed in the end.
class Descriptor {
 public:
  explicit Descriptor(int number = -1) : number_(number) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (is_open()) close(number_);
  }
  bool is_open() const { return number_ >= 0; }
  int number() const { return number_; }

 private:
  int number_;
};

// Closed where the driver passes the allocation to nobody.
Descriptor Export(const XlaPool& pool) {
  const DriverApi* driver = GetDriverApi();
  CUmemGenericAllocationHandle handle;
  if (pool.bytes == 0 || driver->retain_allocation(&handle, pool.base) != CUDA_SUCCESS) {
    return Descriptor();
  }
  int number = -1;
  CUresult status = driver->export_handle(&number, handle, kDescriptor, 0);
  driver->release(handle);
  return Descriptor(status == CUDA_SUCCESS ? number : -1);
}

// Maps an allocation of another process for good: kernels of any call may read it. Null where that
// fails.
char* Map(const Descriptor& descriptor, int64_t bytes, int device) {
  const DriverApi* driver = GetDriverApi();
  if (driver == nullptr) return nullptr;
  CUmemGenericAllocationHandle handle;
  void* number = reinterpret_cast<void*>(static_cast<intptr_t>(descriptor.number()));
  if (driver->import_handle(&handle, number, kDescriptor) != CUDA_SUCCESS) return nullptr;
  CUdeviceptr address = 0;
  bool is_reserved = driver->reserve(&address, bytes, 0, 0, 0) == CUDA_SUCCESS;
  bool is_mapped = is_reserved && driver->map(address, bytes, 0, handle, 0) == CUDA_SUCCESS;
  driver->release(handle);  // the mapping holds it
  CUmemAccessDesc access{{CU_MEM_LOCATION_TYPE_DEVICE, device}, CU_MEM_ACCESS_FLAGS_PROT_READ};
  if (is_mapped && driver->set_access(address, bytes, &access, 1) == CUDA_SUCCESS) {
    return reinterpret_cast<char*>(address);
  }
  if (is_mapped) driver->unmap(address, bytes);
  if (is_reserved) driver->free_reserved(address, bytes);
  return nullptr;
}

// The pool that the scratch is from, if it is from one.
XlaPool FindPool(const void* scratch) {
  XlaPool found = scratch != nullptr ? XlaPool::Find(scratch) : XlaPool{};
  return found.bytes > kAllocationBytes ? found : XlaPool{};
}

// What a rank tells the others before descriptors are sent, and where it has mapped theirs after.
struct Offer {
  uint64_t process, mailbox, secret;
  char* base;
  int64_t bytes;
  uint64_t id;  // 0: no pool
};
struct Reply {
  char* mapped[kMaxRanks];
};

// How long all letters of a meeting may take.
Mailbox::Time Deadline(uint64_t timeout_ns) {
  constexpr uint64_t kMostNs = 5'000'000'000;
  return std::chrono::steady_clock::now() +
         std::chrono::nanoseconds(std::min(kMostNs, timeout_ns / 2));
}

class Delivery {
 public:
  Delivery(const Exchange& exchange,
           const std::vector<Offer>& all,
           const std::vector<SharedPool>& pools,
           const Mailbox& mailbox,
           Mailbox::Time deadline)
      : all_(all),
        pools_(pools),
        mailbox_(mailbox),
        deadline_(deadline),
        num_ranks_(exchange.num_ranks()),
        rank_(exchange.rank()),
        device_(exchange.device()) {}

  // By turns, a rank sends to the one so many places behind it and takes a letter when the one so
  // many before it sends, so that no mailbox fills up for long. Whatever goes wrong leaves pools
  // unmapped.
  Reply Run(const Descriptor& own) {
    for (int rank = 0; rank < num_ranks_; ++rank) {
      if (IsHere(rank) && all_[rank].id != 0) reply_.mapped[rank] = all_[rank].base;
      num_expected_ += SendsToMe(rank);
    }
    bool comes = mailbox_.is_open();
    for (int offset = 1; offset < num_ranks_; ++offset) {
      int to = (rank_ + offset) % num_ranks_, from = (rank_ - offset + num_ranks_) % num_ranks_;
      if (all_[rank_].id != 0 && !IsHere(to)) {
        mailbox_.Send(all_[to].mailbox, {rank_, all_[rank_].secret}, own.number(), deadline_);
      }
      if (comes && num_expected_ > 0 && SendsToMe(from)) comes = Take();
    }
    while (comes && num_expected_ > 0) comes = Take();
    return reply_;
  }

 private:
  bool IsHere(int rank) const { return all_[rank].process == all_[rank_].process; }
  bool SendsToMe(int rank) const { return all_[rank].id != 0 && !IsHere(rank); }

  // False when nothing more comes. Letters of strangers are thrown away.
  bool Take() {
    Letter letter;
    int number = -1;
    if (!mailbox_.Receive(&letter, &number, deadline_)) return false;
    Descriptor descriptor(number);
    int from = letter.rank;
    bool is_rank = from >= 0 && from < num_ranks_ && SendsToMe(from);
    if (!is_rank || letter.secret != all_[from].secret) return true;
    --num_expected_;
    reply_.mapped[from] = Known(from);
    if (reply_.mapped[from] == nullptr) {
      reply_.mapped[from] = Map(descriptor, all_[from].bytes, device_);
    }
    return true;
  }

  // Where the rank's pool has been mapped before, or null.
  char* Known(int rank) const {
    for (const SharedPool& pool : pools_) {
      if (pool.ids[rank] == all_[rank].id) return pool.here[rank];
    }
    return nullptr;
  }

  const std::vector<Offer>& all_;
  const std::vector<SharedPool>& pools_;
  const Mailbox& mailbox_;
  Mailbox::Time deadline_;
  int num_ranks_;
  int rank_;
  int device_;
  int num_expected_ = 0;  // letters
  Reply reply_ = {};
};

}  // namespace

XlaPool XlaPool::Find(const void* address) {
  const DriverApi* driver = GetDriverApi();
  CUdeviceptr base = 0;
  size_t bytes = 0;
  if (driver == nullptr ||
      driver->get_address_range(&base, &bytes, DevicePointer(address)) != CUDA_SUCCESS) {
    return XlaPool{};
  }
  return {
      reinterpret_cast<char*>(base), static_cast<int64_t>(bytes), AllocationId(*driver, address)};
}

bool XlaPool::Holds(const void* address, int64_t num_bytes) const {
  const char* place = static_cast<const char*>(address);
  return place >= base && place + num_bytes <= base + bytes &&
         AllocationId(*GetDriverApi(), address) == id;
}

bool SharedPool::Publish(const void* address,
                         int64_t bytes,
                         int num_ranks,
                         const char** published) const {
  if (own.bytes == 0 || !own.Holds(address, bytes)) return false;
  int64_t offset = static_cast<const char*>(address) - own.base;
  for (int rank = 0; rank < num_ranks; ++rank) published[rank] = there[rank] + offset;
  return true;
}

ffi::Error SharePool(Exchange& exchange,
                     const void* scratch,
                     uint64_t timeout_ns,
                     std::vector<SharedPool>* pools) {
  XlaPool pool = FindPool(scratch);
  Descriptor exported = Export(pool);
  Offer mine{ProcessToken(), RandomBits(), RandomBits(), pool.base, pool.bytes, pool.id};
  Mailbox mailbox(mine.mailbox);
  if (!exported.is_open() || !mailbox.is_open()) mine.id = 0;
  std::vector<Offer> all;
  JAX_MOE_EP_RETURN_IF_ERROR(exchange.Gather(mine, &all, timeout_ns));

  SharedPool found;
  bool has_some = false;
  for (size_t rank = 0; rank < all.size(); ++rank) {
    found.ids[rank] = all[rank].id;
    has_some |= all[rank].id != 0;
  }
  auto has_ids = [&](const SharedPool& each) {
    return std::equal(std::begin(each.ids), std::end(each.ids), std::begin(found.ids));
  };
  if (!has_some || std::any_of(pools->begin(), pools->end(), has_ids)) return ffi::Error::Success();

  Delivery delivery(exchange, all, *pools, mailbox, Deadline(timeout_ns));
  Reply reply = delivery.Run(exported);
  std::vector<Reply> replies;
  JAX_MOE_EP_RETURN_IF_ERROR(exchange.Gather(reply, &replies, timeout_ns));
  bool is_everywhere = mine.id != 0;
  for (size_t rank = 0; rank < all.size(); ++rank) {
    found.here[rank] = reply.mapped[rank];
    found.there[rank] = replies[rank].mapped[exchange.rank()];
    is_everywhere &= found.there[rank] != nullptr;
  }
  if (is_everywhere) found.own = pool;
  pools->push_back(found);
  return ffi::Error::Success();
}

}  // namespace jax_moe_ep
