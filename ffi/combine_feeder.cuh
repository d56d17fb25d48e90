// What a warp of combine loads next: pieces are claimed, and the tiles that they need put into its
// ring, in the order in which they are added.

#ifndef JAX_MOE_EP_COMBINE_FEEDER_CUH_
#define JAX_MOE_EP_COMBINE_FEEDER_CUH_

#include "combine_group.cuh"
#include "tile_ring.cuh"

namespace jax_moe_ep {
namespace {

// What a tile is, and what is due once it has been added.
struct CombineNote {
  enum : uint32_t {
    kRow = 1,        // of this rank: its product with the weight goes into this rank's partial
    kPartial = 2,    // of a peer
    kSent = 4,       // this rank's partial is complete, for a peer
    kKept = 8,       // or for the sum
    kLastTile = 16,  // the sum is complete
  };
  uint32_t what;
  float weight;
  int bytes;
  void* out;       // of a complete partial for a peer, or of a complete sum
  uint64_t* flag;  // to raise
};
using CombineRing = TileRing<CombineNote>;

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
  int size;      // at least 1: a token without rows is a note alone
  int num_rows;  // the first of them
  int row;       // the place of this lane's row, -1 for none
  int partial;   // likewise of its partial
  int keep;      // the place after which this rank's partial takes its turn in the sum

  CombineBatch() = default;
  __device__ CombineBatch(const CombineToken& token, int me) {
    int lane = threadIdx.x % kWarpSize;
    uint32_t lanes_below = (1u << lane) - 1, own = 1u << me;
    uint32_t rows = __ballot_sync(kAllLanes, token.slot >= 0);
    num_rows = __popc(rows);
    size = max(num_rows + __popc(token.ranks & ~own), 1);
    row = token.slot >= 0 ? __popc(rows & lanes_below) : -1;
    bool has_partial = lane != me && (token.ranks >> lane & 1);
    partial = has_partial ? num_rows + __popc(token.ranks & ~own & lanes_below) : -1;
    keep = num_rows > 0 ? num_rows - 1 + __popc(token.ranks & (own - 1)) : -1;
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

  // Puts tiles until the ring is full, there are no more, or partials that have not landed are
  // next. For these it waits only when the ring is empty: what it claimed before is done then.
  // False when a rank gave up.
  __device__ bool Feed() {
    while (is_fine_ && !IsDone()) {
      if (token_ == piece_.end_token) {
        if (!EndPiece()) break;
      } else if (!has_begun_) {
        BeginToken();
      } else if (!PutTiles()) {
        break;
      }
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
      if (ring_.Room(1) == 0) return false;
      CombineNote note{};
      note.flag = p_.LandedFlag(Peer(p_.group, item_.offset), me(), item_.piece, epoch_);
      if (lane() == 0) ring_.Put(0, nullptr, 0, note);
      ring_.Advance(1);
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
    has_landed_ = false;
    batch_ = CombineBatch(now_, me());
    num_put_ = 0;
    column_ = piece_.first_byte;
    int64_t row_bytes = p_.pieces.row_bytes, start = token_ * row_bytes;
    row_ = reinterpret_cast<const char*>(p_.y) + now_.slot * row_bytes;
    if (batch_.partial >= 0) {
      partial_ = reinterpret_cast<const char*>(p_.Landing(me(), lane(), epoch_)) + start;
    }
    T* out = IsPush() ? p_.Landing(Peer(p_.group, item_.offset), me(), epoch_) : p_.out;
    out_ = reinterpret_cast<char*>(out) + start;
  }

  // How many tiles of some columns to put now.
  __device__ int Room() {
    int count = ring_.Room(batch_.size - num_put_);
    bool has_partials = batch_.size > batch_.num_rows && now_.ranks != 0;
    if (count == 0 || !has_partials || num_put_ + count <= batch_.num_rows) return count;
    return HasLanded() ? count : max(batch_.num_rows - num_put_, 0);
  }

  // Tiles of some columns, those that are left. False when none can be put.
  __device__ bool PutTiles() {
    int count = Room();
    if (count == 0) return false;
    int bytes = static_cast<int>(min(int64_t{kTileBytes}, piece_.end_byte - column_));
    auto put = [&](int place, const char* from, uint32_t what) {
      if (place < num_put_ || place >= num_put_ + count) return;
      CombineNote note{what, now_.weight, bytes, nullptr, nullptr};
      if (place == batch_.keep) note.what |= IsPush() ? CombineNote::kSent : CombineNote::kKept;
      if (place == batch_.size - 1) {
        note.out = out_ + column_;
        if (!IsPush()) note.what |= CombineNote::kLastTile;
      }
      ring_.Put(place - num_put_, from, from == nullptr ? 0 : bytes, note);
    };
    put(batch_.row, row_ + column_, CombineNote::kRow);
    if (!IsPush()) {
      bool has_none = now_.ranks == 0;  // a note alone, of lane 0
      put(has_none ? lane() : batch_.partial,
          has_none ? nullptr : partial_ + column_,
          has_none ? 0 : CombineNote::kPartial);
    }
    ring_.Advance(count);
    has_put_ = IsPush();
    num_put_ += count;
    if (num_put_ < batch_.size) return true;
    num_put_ = 0;
    column_ += kTileBytes;
    if (column_ >= piece_.end_byte) NextToken();
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
  int64_t column_ = 0;             // in bytes
  const char* row_ = nullptr;      // of this lane's k
  const char* partial_ = nullptr;  // of the rank that this lane stands for
  char* out_ = nullptr;
};

}  // namespace
}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_COMBINE_FEEDER_CUH_
