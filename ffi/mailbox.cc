#include "mailbox.h"

#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstring>

namespace jax_moe_ep {
namespace {

struct Address {
  sockaddr_un address = {};
  socklen_t size = 0;

  explicit Address(uint64_t name) {
    address.sun_family = AF_UNIX;
    // A name that begins with 0 is no path.
    int length = snprintf(address.sun_path + 1,
                          sizeof(address.sun_path) - 1,
                          "jax_moe_ep-%016llx",
                          static_cast<unsigned long long>(name));
    size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + length);
  }
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&address); }
};

// One letter with room for one descriptor, not for the second that padding would hold.
struct Envelope {
  iovec text;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message = {};

  explicit Envelope(Letter* letter) : text{letter, sizeof(Letter)} {
    message.msg_iov = &text;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = CMSG_LEN(sizeof(int));
  }
};

}  // namespace

Mailbox::Mailbox(uint64_t name) {
  int opened = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (opened < 0) return;
  Address address(name);
  if (bind(opened, address.get(), address.size) == 0) {
    socket_ = opened;
  } else {
    close(opened);
  }
}

Mailbox::~Mailbox() {
  if (is_open()) close(socket_);
}

// Bounds the next call of this kind. False when the deadline has passed.
bool Mailbox::SetTimeout(int option, Time deadline) const {
  auto left = std::chrono::duration_cast<std::chrono::microseconds>(
      deadline - std::chrono::steady_clock::now());
  if (left.count() <= 0) return false;
  timeval timeout{left.count() / 1'000'000, left.count() % 1'000'000};
  return setsockopt(socket_, SOL_SOCKET, option, &timeout, sizeof(timeout)) == 0;
}

bool Mailbox::Send(uint64_t to, const Letter& letter, int descriptor, Time deadline) const {
  Letter copy = letter;
  Envelope envelope(&copy);
  Address address(to);
  envelope.message.msg_name = &address.address;
  envelope.message.msg_namelen = address.size;
  cmsghdr* header = CMSG_FIRSTHDR(&envelope.message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  memcpy(CMSG_DATA(header), &descriptor, sizeof(int));
  ssize_t bytes;
  do {  // again where a signal came between
    if (!SetTimeout(SO_SNDTIMEO, deadline)) return false;
    bytes = sendmsg(socket_, &envelope.message, MSG_NOSIGNAL);
  } while (bytes < 0 && errno == EINTR);
  return bytes == sizeof(Letter);
}

bool Mailbox::Receive(Letter* letter, int* descriptor, Time deadline) const {
  Envelope envelope(letter);
  *descriptor = -1;
  ssize_t bytes;
  do {
    if (!SetTimeout(SO_RCVTIMEO, deadline)) return false;
    bytes = recvmsg(socket_, &envelope.message, MSG_CMSG_CLOEXEC);
  } while (bytes < 0 && errno == EINTR);
  if (bytes < 0) return false;
  const cmsghdr* header = CMSG_FIRSTHDR(&envelope.message);
  bool has_descriptor = header != nullptr && header->cmsg_level == SOL_SOCKET &&
                        header->cmsg_type == SCM_RIGHTS &&
                        header->cmsg_len == CMSG_LEN(sizeof(int));
  if (has_descriptor) memcpy(descriptor, CMSG_DATA(header), sizeof(int));
  if (bytes != sizeof(Letter)) *letter = Letter{-1, 0};
  return true;
}

}  // namespace jax_moe_ep
