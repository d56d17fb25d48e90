#include "identity.h"

#include <unistd.h>

#include <cstdio>
#include <functional>
#include <random>
#include <string>

namespace jax_moe_ep {

uint64_t RandomBits() {
  std::random_device device;
  return uint64_t{device()} << 32 | device();
}

uint64_t ProcessToken() {
  static const uint64_t token = RandomBits();
  return token;
}

uint64_t HostToken() {
  char text[64] = {};
  if (FILE* file = fopen("/proc/sys/kernel/random/boot_id", "r")) {
    if (fgets(text, sizeof(text), file) == nullptr) text[0] = 0;
    fclose(file);
  }
  if (text[0] == 0) gethostname(text, sizeof(text) - 1);
  return std::hash<std::string>{}(text);
}

}  // namespace jax_moe_ep
