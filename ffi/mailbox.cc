#include "mailbox.h"

#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

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

// One letter with room for one descriptor.
struct Envelope {
  iovec text;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message = {};

  explicit Envelope(Letter* letter) : text{letter, sizeof(Letter)} {
    message.msg_iov = &text;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
  }
};

}  // namespace

Mailbox::Mailbox(uint64_t name) {
  int opened = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (opened < 0) return;
  timeval patience{kPatienceMs / 1000, kPatienceMs % 1000 * 1000};
  Address address(name);
  bool is_ready = setsockopt(opened, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience)) == 0 &&
                  setsockopt(opened, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience)) == 0 &&
                  bind(opened, address.get(), address.size) == 0;
  if (is_ready) {
    socket_ = opened;
  } else {
    close(opened);
  }
}

Mailbox::~Mailbox() {
  if (is_open()) close(socket_);
}

bool Mailbox::Send(uint64_t to, const Letter& letter, int descriptor) const {
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
  return sendmsg(socket_, &envelope.message, MSG_NOSIGNAL) == sizeof(Letter);
}

bool Mailbox::Receive(Letter* letter, int* descriptor) const {
  Envelope envelope(letter);
  ssize_t bytes = recvmsg(socket_, &envelope.message, MSG_CMSG_CLOEXEC);
  if (bytes < 0) return false;
  *descriptor = -1;
  const cmsghdr* header = CMSG_FIRSTHDR(&envelope.message);
  bool has_descriptor = header != nullptr && header->cmsg_level == SOL_SOCKET &&
                        header->cmsg_type == SCM_RIGHTS &&
                        header->cmsg_len == CMSG_LEN(sizeof(int));
  if (has_descriptor) memcpy(descriptor, CMSG_DATA(header), sizeof(int));
  if (bytes != sizeof(Letter)) *letter = Letter{-1, 0};
  return true;
}

}  // namespace jax_moe_ep
