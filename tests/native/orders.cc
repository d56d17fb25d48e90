// Prints in which order a rank takes its work, for test_orders.py:
//
//   orders pulls NUM_RANKS RANK NUM_TOKENS LEAD     source and token of every position
//   orders combine NUM_RANKS NUM_PIECES AHEAD       offset and piece of every position

#include <cstdio>
#include <cstdlib>
#include <string>

#include "order.h"

using namespace jax_moe_ep;

namespace {

void Print(int64_t a, int64_t b) {
  printf("%lld %lld\n", static_cast<long long>(a), static_cast<long long>(b));
}

}  // namespace

int main(int, char** argv) {
  auto number = [&](int i) { return atoll(argv[i]); };
  int num_ranks = static_cast<int>(number(2));
  if (std::string(argv[1]) == "pulls") {
    int rank = static_cast<int>(number(3)), source = 0;
    PullOrder order{number(4), number(5)};
    for (int64_t position = 0; position < order.size(num_ranks); ++position) {
      int64_t token = 0;
      order.Find(rank, num_ranks, position, &source, &token);
      Print(source, token);
    }
  } else {
    CombineOrder order{num_ranks, number(3), number(4)};
    for (int64_t position = 0; position < order.size(); ++position) {
      CombineItem item = order.Find(position);
      Print(item.offset, item.piece);
    }
  }
  return 0;
}
