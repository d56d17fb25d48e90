// The warp of combine that fills a ring: it claims pieces and puts the tiles that they need, in the
// order in which they are added.

#ifndef JAX_MOE_EP_COMBINE_FEEDER_CUH_
#define JAX_MOE_EP_COMBINE_FEEDER_CUH_

#include "combine_group.cuh"
#include "tile_ring.cuh"

namespace jax_moe_ep {
namespace {

// A group of tiles, and what is due once they have been added. Each tile's note is its weight.
struct alignas(16) CombineNote {
  enum : uint32_t {
    kRows = 1,       // of this rank: products with the weights go into this rank's partial
    kPartials = 2,   // of peers
    kSent = 4,       // this rank's partial is complete, for a peer
    kKept = 8,       // or for the sum
    kLastTile = 16,  // the sum is complete
    kEnd = 32,       // no group follows
  };
  uint32_t what;
  int num_tiles;
  int bytes;        // of each
  int num_claimed;  // with kEnd: items that are done now, 0 when a rank gave up
  void* out;        // of a complete partial for a peer, or of a complete sum
  uint64_t* flag;   // to raise
};
using CombineRings = Rings<CombineNote, float>;
using CombineWriter = RingWriter<CombineNote, float>;
using CombineReader = RingReader<CombineNote, float>;

// A token of a piece on the way into the ring, of k = lane.
struct CombineToken {
  int32_t slot;
  int32_t owner;  // of a sum alone
  float weight;
};

// The tiles that make the result of some columns of a token: first this rank's rows, in the order
// of k, which need nobody; then the peers' partials, in the order of ranks. Lane k puts its row,
// lane r rank r's partial.
struct CombineBatch {
  int size;      // 0: a token without rows
  int num_rows;  // the first of them
  int row;       // the place of this lane's row, -1 for none
  int partial;   // likewise of its partial
  int turn;      // after how many tiles this rank's partial is added to the sum, -1 for never

  // ranks: whose partials make the result.
  __device__ CombineBatch(const CombineToken& token, uint32_t ranks, int me) {
    int lane = threadIdx.x % kWarpSize;
    uint32_t lanes_below = (1u << lane) - 1, own = 1u << me;
    uint32_t rows = __ballot_sync(kAllLanes, token.slot >= 0);
    num_rows = __popc(rows);
    size = num_rows + __popc(ranks & ~own);
    row = token.slot >= 0 ? __popc(rows & lanes_below) : -1;
    bool has_partial = lane != me && (ranks >> lane & 1);
    partial = has_partial ? num_rows + __popc(ranks & ~own & lanes_below) : -1;
    turn = num_rows > 0 ? num_rows + __popc(ranks & (own - 1)) : -1;
  }

  // Where the group ends that begins at a place: rows and partials do not mix, nor partials before
  // and after this rank's.
  __device__ int EndOfGroup(int begin) const {
    int end = begin < num_rows ? num_rows : begin < turn ? turn : size;
    return min(begin + kGroupTiles, end);
  }
};

// The claim of a piece, and the loads of its first token's slots and owners, are under way while
// the tiles of the piece before are put; only then it waits for the weights. It may wait for peers
// at any time: the other warp goes on with what has been put.
template <typename T>
class CombineFeeder {
 public:
  __device__ CombineFeeder(const GroupCombineParams<T>& p,
                           CombineWriter& ring,
                           WarpClaims& claims,
                           uint64_t epoch)
      : p_(p), ring_(ring), claims_(claims), epoch_(epoch) {}

  // All that the warp claims.
  __device__ void Feed() {
    Take();
    while (Receive()) {
      item_ = next_;
      piece_ = next_piece_;
      now_ = next_token_;
      Take();
      PutPiece();
    }
    CombineNote note{};
    note.what = CombineNote::kEnd;
    note.num_claimed = is_fine_ ? num_claimed_ : 0;
    PutNote(note);
  }

 private:
  __device__ int lane() const { return threadIdx.x % kWarpSize; }
  __device__ int me() const { return p_.group.rank; }
  __device__ bool IsPush() const { return item_.offset > 0; }
  __device__ void PutNote(const CombineNote& note) { ring_.Put(0, 0, note, -1, nullptr, 0); }

  // The next claim, and what its first token needs but for weights. Below 0 there is none.
  __device__ void Take() {
    int64_t position = claims_.Next();
    next_.offset = -1;
    if (position >= p_.order.size()) return;
    ++num_claimed_;
    next_ = p_.order.Find(position);
    next_piece_ = p_.pieces.At(next_.piece);
    next_token_ = Load(next_, next_piece_.first_token);
  }

  __device__ CombineToken Load(const CombineItem& item, int64_t token) const {
    CombineToken loaded{-1, -1, 1.0f};
    if (lane() >= p_.plan.top_k) return loaded;
    loaded.slot = p_.Slots(Peer(p_.group, item.offset), token)[lane()];
    if (item.offset == 0) loaded.owner = p_.owners[token * p_.plan.top_k + lane()];
    return loaded;
  }

  // Once its rank has sent them. False when a rank gave up.
  __device__ bool LoadWeights(const CombineItem& item, int64_t token, CombineToken& loaded) const {
    int source = Peer(p_.group, item.offset);
    return p_.weights == nullptr || p_.LoadWeights(source, token, epoch_, &loaded.weight);
  }

  // The weights of the claim's first token. False without a claim, or when a rank gave up.
  __device__ bool Receive() {
    if (!is_fine_ || next_.offset < 0) return false;
    bool waits = next_.offset > 0 && !p_.has_few_weights;
    if (waits) is_fine_ = ready_.Wait(p_.group, epoch_, Peer(p_.group, next_.offset));
    is_fine_ = is_fine_ && LoadWeights(next_, next_piece_.first_token, next_token_);
    return is_fine_;
  }

  // Its tiles, then the flag of a push, but for one without rows: owners say so, nobody waits.
  __device__ void PutPiece() {
    bool has_put = false;
    for (int64_t token = piece_.first_token; is_fine_;) {
      has_put |= PutToken(token);
      if (++token == piece_.end_token) break;
      now_ = Load(item_, token);
      is_fine_ = is_fine_ && LoadWeights(item_, token, now_);
    }
    if (!is_fine_ || !IsPush() || !has_put) return;
    CombineNote note{};
    note.flag = p_.LandedFlag(Peer(p_.group, item_.offset), me(), item_.piece, epoch_);
    PutNote(note);
  }

  // Which ranks' partials make the result of the token: a bit a rank.
  __device__ uint32_t Ranks() const {
    if (IsPush()) return __any_sync(kAllLanes, now_.slot >= 0) ? 1u << me() : 0;
    uint32_t owner = now_.owner >= 0 ? 1u << now_.owner : 0;
    return __reduce_or_sync(kAllLanes, owner);
  }

  // The groups of the token's columns. False when there are none.
  __device__ bool PutToken(int64_t token) {
    uint32_t ranks = Ranks();
    if (IsPush() && ranks == 0) return false;
    CombineBatch batch(now_, ranks, me());
    int64_t row_bytes = p_.pieces.parts.row_bytes, start = token * row_bytes + piece_.first_byte;
    const char* row = reinterpret_cast<const char*>(p_.y) + piece_.first_byte;
    row += now_.slot * row_bytes;
    const char* partial = nullptr;
    if (batch.partial >= 0) {
      partial = reinterpret_cast<const char*>(p_.Landing(me(), lane(), epoch_)) + start;
    }
    T* result = IsPush() ? p_.Landing(Peer(p_.group, item_.offset), me(), epoch_) : p_.out;
    char* out = reinterpret_cast<char*>(result) + start;
    uint32_t at_turn = IsPush() ? CombineNote::kSent : CombineNote::kKept;
    uint32_t at_end = IsPush() ? 0 : CombineNote::kLastTile;
    bool has_landed = false;
    int64_t bytes_left = piece_.end_byte - piece_.first_byte;
    int begin = 0;
    while (bytes_left > 0) {
      int end = batch.EndOfGroup(begin), num_tiles = end - begin;
      bool is_rows = begin < batch.num_rows;
      if (!is_rows && !has_landed) {
        if (!WaitForPartials(batch)) return true;
        has_landed = true;
      }
      uint32_t what = is_rows ? CombineNote::kRows : CombineNote::kPartials;
      if (end == batch.turn) what |= at_turn;
      if (end == batch.size) what |= at_end;
      int bytes = static_cast<int>(min(int64_t{kTileBytes}, bytes_left));
      CombineNote note{what, num_tiles, bytes, 0, out, nullptr};
      int tile = (is_rows ? batch.row : batch.partial) - begin;
      ring_.Put(num_tiles, bytes, note, tile, is_rows ? row : partial, now_.weight);
      begin = end;
      if (end < batch.size) continue;
      begin = 0;
      bytes_left -= kTileBytes;
      row += kTileBytes;
      partial += kTileBytes;
      out += kTileBytes;
    }
    return true;
  }

  // Until bulk copies may read the peers' partials of the piece. False when a rank gave up.
  __device__ bool WaitForPartials(const CombineBatch& batch) {
    const uint64_t* flag = p_.LandedFlag(me(), lane(), item_.piece, epoch_);
    bool has_landed =
        batch.partial < 0 || WaitForFlag(p_.group, flag, epoch_, Phase::kLanded, lane());
    is_fine_ = !__any_sync(kAllLanes, !has_landed);
    __syncwarp();  // some lanes have acquired for those that load
    ptx::FenceProxyAsync();
    return is_fine_;
  }

  const GroupCombineParams<T>& p_;
  CombineWriter& ring_;
  WarpClaims& claims_;
  uint64_t epoch_;
  WarpReady ready_;
  bool is_fine_ = true;
  int num_claimed_ = 0;
  // The next piece.
  CombineItem next_{-1, 0};
  Piece next_piece_{};
  CombineToken next_token_{};
  // The one whose tiles are put.
  CombineItem item_{-1, 0};
  Piece piece_{};
  CombineToken now_{};
};

}  // namespace
}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_COMBINE_FEEDER_CUH_
