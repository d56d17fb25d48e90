// Passes file descriptors between processes of one host, over Unix sockets.

#ifndef JAX_MOE_EP_MAILBOX_H_
#define JAX_MOE_EP_MAILBOX_H_

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

  // False when nobody has a mailbox of that name, or it stays full for kPatienceMs.
  bool Send(uint64_t to, const Letter& letter, int descriptor) const;

  // The next letter. False when none comes for kPatienceMs. *descriptor is the caller's to close.
  bool Receive(Letter* letter, int* descriptor) const;

  static constexpr int kPatienceMs = 5000;

 private:
  int socket_ = -1;
};

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_MAILBOX_H_
