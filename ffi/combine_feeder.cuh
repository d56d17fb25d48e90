// What a warp of combine loads next: pieces are claimed, and the tiles that they need put into its
// ring, in the order in which they are added.

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
  };
  uint32_t what;
  int num_tiles;
  int bytes;       // of each
  void* out;       // of a complete partial for a peer, or of a complete sum
  uint64_t* flag;  // to raise
};
using CombineRing = TileRing<CombineNote, float>;

// A token of a piece on the way into the ring.
struct CombineToken {
  int32_t slot;    // of k = lane
  int32_t owner;   // likewise; of a sum alone
  float weight;    // likewise
  uint32_t ranks;  // a bit a rank: whose partials make the result; once the token is next
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

  CombineBatch() = default;
  __device__ CombineBatch(const CombineToken& token, int me) {
    int lane = threadIdx.x % kWarpSize;
    uint32_t lanes_below = (1u << lane) - 1, own = 1u << me;
    uint32_t rows = __ballot_sync(kAllLanes, token.slot >= 0);
    num_rows = __popc(rows);
    size = num_rows + __popc(token.ranks & ~own);
    row = token.slot >= 0 ? __popc(rows & lanes_below) : -1;
    bool has_partial = lane != me && (token.ranks >> lane & 1);
    partial = has_partial ? num_rows + __popc(token.ranks & ~own & lanes_below) : -1;
    turn = num_rows > 0 ? num_rows + __popc(token.ranks & (own - 1)) : -1;
  }

  // Where the group ends that begins at a place: rows and partials do not mix, nor partials before
  // and after this rank's.
  __device__ int EndOfGroup(int begin) const {
    int end = begin < num_rows ? num_rows : begin < turn ? turn : size;
    return min(begin + kGroupTiles, end);
  }
};

// What a warp feeds its ring with. The claim of a piece, and the loads of what its first token
// needs, are under way while the piece before is fed.
template <typename T>
class CombineFeeder {
 public:
  __device__ CombineFeeder(const GroupCombineParams<T>& p,
                           CombineRing& ring,
                           WarpClaims& claims,
                           uint64_t epoch)
      : p_(p), ring_(ring), claims_(claims), epoch_(epoch) {}

  // Puts groups until the ring is full, there are no more, or partials that have not landed are
  // next. For these it waits only when the ring is empty: what it claimed before is done then.
  // False when a rank gave up.
  __device__ bool Feed() {
    while (is_fine_ && !IsDone()) {
      if (token_ == piece_.end_token) {
        if (!EndPiece()) break;
        continue;
      }
      if (!has_begun_) BeginToken();
      if (has_begun_ && !PutGroups()) break;
    }
    return is_fine_;
  }

  __device__ int64_t num_claimed() const { return num_claimed_; }

 private:
  __device__ int lane() const { return threadIdx.x % kWarpSize; }
  __device__ int me() const { return p_.group.rank; }
  __device__ bool IsDone() const { return item_.offset < 0; }
  __device__ bool IsPush() const { return item_.offset > 0; }

  // Takes the next claim, and loads what its first token needs.
  __device__ void Prepare() {
    int64_t position = claims_.Next();
    next_.offset = -1;
    if (position >= p_.order.size()) return;
    ++num_claimed_;
    next_ = p_.order.Find(position);
    int source = Peer(p_.group, next_.offset);
    if (next_.offset > 0 && !ready_.Wait(p_.group, epoch_, source)) {
      next_.offset = -1;
      is_fine_ = false;
      return;
    }
    next_piece_ = p_.pieces.At(next_.piece);
    next_token_ = Load(next_.offset, source, next_piece_.first_token);
  }

  __device__ CombineToken Load(int offset, int source, int64_t token) const {
    CombineToken loaded{-1, -1, 1.0f, 0};
    if (lane() < p_.plan.top_k) {
      loaded.slot = p_.Slots(source, token)[lane()];
      const float* weights = p_.Weights(source, token, epoch_);
      if (weights != nullptr) loaded.weight = weights[lane()];
      if (offset == 0) loaded.owner = p_.owners[token * p_.plan.top_k + lane()];
    }
    return loaded;
  }

  __device__ void MakeRanks() {
    if (IsPush()) {
      now_.ranks = __any_sync(kAllLanes, now_.slot >= 0) ? 1u << me() : 0;
      return;
    }
    now_.ranks = now_.owner >= 0 ? 1u << now_.owner : 0;
    now_.ranks = __reduce_or_sync(kAllLanes, now_.ranks);
  }

  // The flag of a finished push, then the piece that was prepared. False when the ring is full.
  __device__ bool EndPiece() {
    if (has_put_) {
      if (!ring_.HasRoom(0)) return false;
      CombineNote note{};
      note.flag = p_.LandedFlag(Peer(p_.group, item_.offset), me(), item_.piece, epoch_);
      ring_.Put(0, 0, note, -1, nullptr, 0);
      has_put_ = false;
    }
    item_ = next_;
    if (IsDone()) return true;
    piece_ = next_piece_;
    token_ = piece_.first_token;
    now_ = next_token_;
    MakeRanks();
    Prepare();
    return true;
  }

  __device__ void NextToken() {
    has_begun_ = false;
    if (++token_ == piece_.end_token) return;
    now_ = Load(item_.offset, Peer(p_.group, item_.offset), token_);
    MakeRanks();
  }

  // Whether bulk copies may read the peers' partials of the token. Waits for them when all else is
  // done.
  __device__ bool HasLanded() {
    if (has_landed_) return true;
    bool counts = lane() != me() && (now_.ranks >> lane() & 1);
    const uint64_t* flag = p_.LandedFlag(me(), lane(), item_.piece, epoch_);
    bool is_missing = counts && LoadAcquireSystem(flag) < epoch_;
    if (__any_sync(kAllLanes, is_missing)) {
      if (!ring_.IsEmpty() || num_put_ < batch_.num_rows) return false;
      is_missing = counts && !WaitForFlag(p_.group, flag, epoch_, Phase::kLanded, lane());
      is_fine_ = !__any_sync(kAllLanes, is_missing);
      if (!is_fine_) return false;
    }
    __syncwarp();  // some lanes have acquired for those that load
    ptx::FenceProxyAsync();
    has_landed_ = true;
    return true;
  }

  __device__ void BeginToken() {
    if (IsPush() && now_.ranks == 0) {  // owners say so: nobody waits
      NextToken();
      return;
    }
    has_begun_ = true;
    batch_ = CombineBatch(now_, me());
    has_landed_ = batch_.size == batch_.num_rows;
    num_put_ = 0;
    bytes_left_ = piece_.end_byte - piece_.first_byte;
    int64_t row_bytes = p_.pieces.row_bytes, start = token_ * row_bytes + piece_.first_byte;
    row_ = reinterpret_cast<const char*>(p_.y) + now_.slot * row_bytes + piece_.first_byte;
    if (batch_.partial >= 0) {
      partial_ = reinterpret_cast<const char*>(p_.Landing(me(), lane(), epoch_)) + start;
    }
    T* out = IsPush() ? p_.Landing(Peer(p_.group, item_.offset), me(), epoch_) : p_.out;
    out_ = reinterpret_cast<char*>(out) + start;
  }

  // The token's groups, column after column. False when one cannot be put yet.
  __device__ bool PutGroups() {
    uint32_t at_turn = IsPush() ? CombineNote::kSent : CombineNote::kKept;
    uint32_t at_end = IsPush() ? 0 : CombineNote::kLastTile;
    while (bytes_left_ > 0) {
      int end = batch_.EndOfGroup(num_put_), num_tiles = end - num_put_;
      if (!ring_.HasRoom(num_tiles)) return false;
      bool is_rows = num_put_ < batch_.num_rows;
      if (!is_rows && !HasLanded()) return false;
      uint32_t what = is_rows ? CombineNote::kRows : CombineNote::kPartials;
      if (end == batch_.turn) what |= at_turn;
      if (end == batch_.size) what |= at_end;
      int bytes = static_cast<int>(min(int64_t{kTileBytes}, bytes_left_));
      CombineNote note{what, num_tiles, bytes, out_, nullptr};
      int tile = (is_rows ? batch_.row : batch_.partial) - num_put_;
      ring_.Put(num_tiles, bytes, note, tile, is_rows ? row_ : partial_, now_.weight);
      num_put_ = end;
      if (end < batch_.size) continue;
      num_put_ = 0;
      bytes_left_ -= kTileBytes;
      row_ += kTileBytes;
      partial_ += kTileBytes;
      out_ += kTileBytes;
    }
    has_put_ = IsPush();
    NextToken();
    return true;
  }

  const GroupCombineParams<T>& p_;
  CombineRing& ring_;
  WarpClaims& claims_;
  uint64_t epoch_;
  WarpReady ready_;
  bool is_fine_ = true;
  int64_t num_claimed_ = 0;
  // The next piece; an empty one at first.
  CombineItem next_{0, 0};
  Piece next_piece_{};
  CombineToken next_token_{};
  // What is being fed.
  CombineItem item_{0, 0};
  Piece piece_{};
  int64_t token_ = 0;
  CombineToken now_{};
  bool has_begun_ = false;   // the token
  bool has_landed_ = false;  // its partials
  bool has_put_ = false;     // tiles of the piece, whose flag is due
  CombineBatch batch_{};
  int num_put_ = 0;                // of the batch
  int64_t bytes_left_ = 0;         // of the columns, from here on
  const char* row_ = nullptr;      // there, of this lane's k
  const char* partial_ = nullptr;  // likewise, of the rank that this lane stands for
  char* out_ = nullptr;
};

}  // namespace
}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_COMBINE_FEEDER_CUH_
