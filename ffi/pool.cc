#include "pool.h"

#include <unistd.h>

#include <algorithm>
#include <utility>

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
  Descriptor(Descriptor&& other) : number_(std::exchange(other.number_, -1)) {}
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
  CUmemAccessDesc access{{CU_MEM_LOCATION_TYPE_DEVICE, device}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  if (is_mapped && driver->set_access(address, bytes, &access, 1) == CUDA_SUCCESS) {
    return reinterpret_cast<char*>(address);
  }
  if (is_mapped) driver->unmap(address, bytes);
  if (is_reserved) driver->free_reserved(address, bytes);
  return nullptr;
}

// What a rank tells the others before descriptors are sent, and where it has mapped theirs after.
struct Offer {
  uint64_t host, process, mailbox, secret;
  char* base;
  int64_t bytes;
  uint64_t id;  // 0: no pool
};
struct Reply {
  char* mapped[kMaxRanks];
};

class Delivery {
 public:
  Delivery(const std::vector<Offer>& all, int rank, int device, const Mailbox& mailbox)
      : all_(all), rank_(rank), device_(device), mailbox_(mailbox) {}

  // Every rank sends a letter and takes one by turns, so that no mailbox fills up: at most one
  // letter a rank is under way. Whatever goes wrong leaves pools unmapped.
  Reply Run(const Descriptor& own) {
    int num_ranks = static_cast<int>(all_.size()), num_expected = 0;
    for (int rank = 0; rank < num_ranks; ++rank) {
      if (IsHere(rank)) reply_.mapped[rank] = all_[rank].id != 0 ? all_[rank].base : nullptr;
      num_expected += SendsToMe(rank);
    }
    bool comes = mailbox_.is_open();
    for (int offset = 1; offset < num_ranks; ++offset) {
      int peer = (rank_ + offset) % num_ranks;
      if (all_[rank_].id != 0 && !IsHere(peer) && IsOnHost(peer)) {
        mailbox_.Send(all_[peer].mailbox, {rank_, all_[rank_].secret}, own.number());
      }
      if (comes && num_expected > 0) comes = Take(&num_expected);
    }
    while (comes && num_expected > 0) comes = Take(&num_expected);
    return reply_;
  }

 private:
  bool IsHere(int rank) const { return all_[rank].process == all_[rank_].process; }
  bool IsOnHost(int rank) const { return all_[rank].host == all_[rank_].host; }
  bool SendsToMe(int rank) const { return all_[rank].id != 0 && !IsHere(rank) && IsOnHost(rank); }

  // False when nothing more comes. Letters of strangers are thrown away.
  bool Take(int* num_expected) {
    Letter letter;
    int number = -1;
    if (!mailbox_.Receive(&letter, &number)) return false;
    Descriptor descriptor(number);
    bool is_rank = letter.rank >= 0 && letter.rank < static_cast<int>(all_.size());
    if (!is_rank || !SendsToMe(letter.rank) || letter.secret != all_[letter.rank].secret) {
      return true;
    }
    --*num_expected;
    reply_.mapped[letter.rank] = Map(descriptor, all_[letter.rank].bytes, device_);
    return true;
  }

  const std::vector<Offer>& all_;
  int rank_;
  int device_;
  const Mailbox& mailbox_;
  Reply reply_ = {};
};

// What nothing but this rank's `bytes` bytes is in is no pool: it goes with them.
XlaPool FindPool(const void* address, int64_t bytes) {
  XlaPool pool = XlaPool::Find(address);
  return pool.bytes > RoundToAllocation(bytes) ? pool : XlaPool{};
}

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

bool XlaPool::Holds(const void* address) const {
  const char* place = static_cast<const char*>(address);
  return place >= base && place < base + bytes && AllocationId(*GetDriverApi(), address) == id;
}

bool SharedPool::Publish(const void* address, int num_ranks, const char** published) const {
  if (pool.bytes == 0 || !pool.Holds(address)) return false;
  int64_t offset = static_cast<const char*>(address) - pool.base;
  for (int rank = 0; rank < num_ranks; ++rank) published[rank] = mapped[rank] + offset;
  return true;
}

ffi::Error SharePool(Exchange& exchange,
                     const void* address,
                     int64_t bytes,
                     uint64_t timeout_ns,
                     std::vector<SharedPool>* pools) {
  XlaPool pool = FindPool(address, bytes);
  Descriptor exported = Export(pool);
  Offer mine{
      HostToken(), ProcessToken(), RandomBits(), RandomBits(), pool.base, pool.bytes, pool.id};
  Mailbox mailbox(mine.mailbox);
  if (!exported.is_open() || !mailbox.is_open()) mine.id = 0;
  std::vector<Offer> all;
  JAX_MOE_EP_RETURN_IF_ERROR(exchange.Gather(mine, &all, timeout_ns));

  SharedPool found;
  for (size_t rank = 0; rank < all.size(); ++rank) found.ids[rank] = all[rank].id;
  auto has_ids = [&](const SharedPool& each) {
    return std::equal(std::begin(each.ids), std::end(each.ids), std::begin(found.ids));
  };
  bool has_none =
      std::all_of(std::begin(found.ids), std::end(found.ids), [](uint64_t id) { return id == 0; });
  if (has_none || std::any_of(pools->begin(), pools->end(), has_ids)) return ffi::Error::Success();

  Reply reply = Delivery(all, exchange.rank(), exchange.device(), mailbox).Run(exported);
  std::vector<Reply> replies;
  JAX_MOE_EP_RETURN_IF_ERROR(exchange.Gather(reply, &replies, timeout_ns));
  bool is_everywhere = mine.id != 0;
  for (size_t rank = 0; rank < all.size(); ++rank) {
    found.mapped[rank] = replies[rank].mapped[exchange.rank()];
    is_everywhere &= found.mapped[rank] != nullptr;
  }
  if (is_everywhere) found.pool = pool;
  pools->push_back(found);
  return ffi::Error::Success();
}

}  // namespace jax_moe_ep
