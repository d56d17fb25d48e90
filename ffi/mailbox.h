// Passes file descriptors between processes of one host, over Unix sockets.

#ifndef JAX_MOE_EP_MAILBOX_H_
#define JAX_MOE_EP_MAILBOX_H_

#include <chrono>
#include <cstdint>

namespace jax_moe_ep {

// What comes with a descriptor. Names of mailboxes are no secret, so that anybody could send one:
// the receiver looks at both.
struct Letter {
  int32_t rank;
  uint64_t secret;
};

// Has a name in the abstract namespace of sockets, which processes of one network namespace share
// and which leaves nothing behind.
class Mailbox {
 public:
  explicit Mailbox(uint64_t name);
  ~Mailbox();
  Mailbox(const Mailbox&) = delete;
  Mailbox& operator=(const Mailbox&) = delete;

  bool is_open() const { return socket_ >= 0; }

  using Time = std::chrono::steady_clock::time_point;

  // False when nobody has a mailbox of that name, or it is full until the deadline.
  bool Send(uint64_t to, const Letter& letter, int descriptor, Time deadline) const;

  // The next letter, of rank -1 when it is none. False when nothing comes until the deadline.
  // *descriptor is the caller's to close, or -1.
  bool Receive(Letter* letter, int* descriptor, Time deadline) const;

 private:
  bool SetTimeout(int option, Time deadline) const;

  int socket_ = -1;
};

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_MAILBOX_H_
