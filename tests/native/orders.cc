// Prints in which order a rank takes its work, for test_orders.py:
//
//   orders pulls NUM_RANKS RANK NUM_TOKENS LEAD     source and token of every position
//   orders combine NUM_RANKS NUM_PIECES AHEAD       offset and piece of every position
//   orders pieces NUM_TOKENS ROW_BYTES HAS_FEW_SMS  tokens and bytes of every piece, from and to

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
  if (std::string(argv[1]) == "pulls") {
    int num_ranks = static_cast<int>(number(2));
    int rank = static_cast<int>(number(3)), source = 0;
    PullOrder order{number(4), number(5)};
    for (int64_t position = 0; position < order.size(num_ranks); ++position) {
      int64_t token = 0;
      order.Find(rank, num_ranks, position, &source, &token);
      Print(source, token);
    }
  } else if (std::string(argv[1]) == "pieces") {
    CombinePieces pieces(number(2), number(3), number(4) != 0);
    for (int64_t i = 0; i < pieces.size(); ++i) {
      Piece piece = pieces.At(i);
      Print(piece.first_token, piece.end_token);
      Print(piece.first_byte, piece.end_byte);
    }
  } else {
    CombineOrder order{static_cast<int>(number(2)), number(3), number(4)};
    for (int64_t position = 0; position < order.size(); ++position) {
      CombineItem item = order.Find(position);
      Print(item.offset, item.piece);
    }
  }
  return 0;
}
