// A warp's ring of tiles in shared memory, which bulk copies fill in order.

#ifndef JAX_MOE_EP_TILE_RING_CUH_
#define JAX_MOE_EP_TILE_RING_CUH_

#include "ptx.cuh"
#include "rows.cuh"

namespace jax_moe_ep {
namespace {

constexpr int kTileVectors = 4;  // of one lane
constexpr int kTileBytes = kTileVectors * kWarpSize * kVecBytes;
constexpr int kBulkWarps = 12;  // of one block an SM
constexpr int kRingTiles = 8;
constexpr int kGroupTiles = kRingTiles / 2;  // at most: one group loads while another is used
static_assert(kRingTiles <= 32, "parities are bits");
constexpr int kLastPlace = kRingTiles - 1;
static_assert((kRingTiles & kLastPlace) == 0, "places wrap by a mask");
constexpr int64_t kRingBytes = int64_t{kBulkWarps} * kRingTiles * kTileBytes;  // 192 KB

// Which of a tile's vectors is vector i of this lane.
__device__ int TilePlace(int i) { return i * kWarpSize + threadIdx.x % kWarpSize; }

// A block's, in shared memory, beside its tiles.
template <typename Note, typename TileNote>
struct RingNotes {
  uint64_t barriers[kBulkWarps][kRingTiles];
  Note groups[kBulkWarps][kRingTiles];
  TileNote tiles[kBulkWarps][kRingTiles];
};

// Neighbouring tiles with one use are a group, with one barrier and a note of the use; each tile
// has a note too. A group may be a note alone, which takes one place. Loads land in any order,
// groups are consumed in the order in which they were put. All lanes of the warp call the
// functions.
template <typename Note, typename TileNote>
class TileRing {
 public:
  // Then a fence of the proxies in shared memory.
  __device__ TileRing(char* tiles, RingNotes<Note, TileNote>& notes) {
    int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    tiles_ = tiles + warp * kRingTiles * kTileBytes;
    barriers_ = notes.barriers[warp];
    notes_ = notes.groups[warp];
    tile_notes_ = notes.tiles[warp];
    if (lane < kRingTiles) ptx::MbarrierInit(&barriers_[lane], 1);
  }

  __device__ bool IsEmpty() const { return size_ == 0; }
  __device__ bool IsHalfEmpty() const { return size_ <= kRingTiles / 2; }
  __device__ bool HasRoom(int num_tiles) const { return size_ + max(num_tiles, 1) <= kRingTiles; }

  // Behind the last group, for which there is room, one of num_tiles. The lane whose `tile` is n of
  // them puts tile n; others have none. `from` and bytes, which all tiles have, are multiples
  // of 16.
  __device__ void Put(int num_tiles,
                      int bytes,
                      const Note& note,
                      int tile,
                      const char* from,
                      const TileNote& tile_note) {
    int begin = first_ + size_;
    uint64_t* barrier = &barriers_[begin & kLastPlace];
    if (threadIdx.x % kWarpSize == 0) {
      notes_[begin & kLastPlace] = note;
      ptx::MbarrierArriveExpectBytes(barrier, num_tiles * bytes);
    }
    if (tile >= 0 && tile < num_tiles) {
      int place = (begin + tile) & kLastPlace;
      tile_notes_[place] = tile_note;
      ptx::BulkLoad(tiles_ + place * kTileBytes, from, bytes, barrier);
    }
    size_ += max(num_tiles, 1);
    __syncwarp();  // all lanes see the notes
  }

  // The note of the oldest group, once it has landed. Not when empty.
  __device__ Note Front() const {
    ptx::MbarrierWait(&barriers_[first_], parities_ >> first_ & 1);
    return notes_[first_];
  }
  __device__ const uint4* Tile(int n) const {
    return reinterpret_cast<const uint4*>(tiles_ + ((first_ + n) & kLastPlace) * kTileBytes);
  }
  __device__ const TileNote& NoteOf(int n) const { return tile_notes_[(first_ + n) & kLastPlace]; }

  // When the lane has read it.
  __device__ void Pop(int num_tiles) {
    __syncwarp();
    parities_ ^= 1u << first_;
    first_ = (first_ + max(num_tiles, 1)) & kLastPlace;
    size_ -= max(num_tiles, 1);
  }

 private:
  char* tiles_;            // [kRingTiles, kTileBytes]
  uint64_t* barriers_;     // [kRingTiles], a group's is its first tile's
  Note* notes_;            // likewise
  TileNote* tile_notes_;   // [kRingTiles]
  int first_ = 0;          // the oldest tile
  int size_ = 0;           // tiles loading or loaded
  uint32_t parities_ = 0;  // a bit a barrier: of its next wait
};

}  // namespace
}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_TILE_RING_CUH_
