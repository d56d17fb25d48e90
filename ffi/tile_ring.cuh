// A ring of tiles in shared memory between two warps: one fills it with bulk copies, in the order
// in which the other uses what has landed.

#ifndef JAX_MOE_EP_TILE_RING_CUH_
#define JAX_MOE_EP_TILE_RING_CUH_

#include "ptx.cuh"
#include "rows.cuh"

namespace jax_moe_ep {
namespace {

constexpr int kTileVectors = 4;  // of one lane
constexpr int kTileBytes = kTileVectors * kWarpSize * kVecBytes;
constexpr int kRings = 8;  // of one block an SM: warp r reads ring r, warp kRings + r fills it
constexpr int kRingThreads = 2 * kRings * kWarpSize;
constexpr int kRingTiles = 8;
constexpr int kGroupTiles = kRingTiles / 2;  // at most: one group loads while another is used
constexpr int kLastPlace = kRingTiles - 1;
static_assert(kRingTiles <= 32, "parities are bits");
static_assert((kRingTiles & kLastPlace) == 0, "places wrap by a mask");
constexpr int64_t kRingBytes = int64_t{kRings} * kRingTiles * kTileBytes;  // 128 KB

// Which of a tile's vectors is vector i of this lane.
__device__ int TilePlace(int i) { return i * kWarpSize + threadIdx.x % kWarpSize; }

// The warp that sends weights reads a ring, and does not begin the call.
__device__ bool SendsWeights() { return threadIdx.x / kWarpSize == 1; }
__device__ bool FillsRing() { return threadIdx.x / kWarpSize >= kRings; }
__device__ int RingOfWarp() { return threadIdx.x / kWarpSize % kRings; }

// A block's rings, in shared memory beside their tiles [kRings, kRingTiles, kTileBytes].
//
// Neighbouring tiles with one use are a group, with one barrier and a note of the use; each tile
// has a note too. A group may be a note alone, which takes one place. Loads land in any order,
// groups are used in the order in which they were put.
template <typename Note, typename TileNote>
struct Rings {
  uint64_t landed[kRings][kRingTiles];  // a group's is that of its first place
  uint64_t read[kRings][kRingTiles];    // of each place
  Note notes[kRings][kRingTiles];       // likewise of its first place
  TileNote tile_notes[kRings][kRingTiles];

  // All threads, then __syncthreads. By warps that fill rings: another begins the call meanwhile.
  __device__ void Init() {
    if (!FillsRing()) return;
    for (int i = threadIdx.x % (kRingThreads / 2); i < kRings * kRingTiles; i += kRingThreads / 2) {
      ptx::MbarrierInit(&landed[0][i], 1);
      ptx::MbarrierInit(&read[0][i], 1);
    }
    ptx::FenceProxyAsyncShared();
  }
};

// The warp that fills a ring: all of its lanes call.
template <typename Note, typename TileNote>
class RingWriter {
 public:
  __device__ RingWriter(char* tiles, Rings<Note, TileNote>& rings)
      : tiles_(tiles + RingOfWarp() * kRingTiles * kTileBytes),
        landed_(rings.landed[RingOfWarp()]),
        read_(rings.read[RingOfWarp()]),
        notes_(rings.notes[RingOfWarp()]),
        tile_notes_(rings.tile_notes[RingOfWarp()]) {}

  // A group of num_tiles, at most kGroupTiles, once there is room. The lane whose `tile` is n of
  // them puts tile n; others have none. `from` and bytes, which all tiles have, are multiples
  // of 16.
  __device__ void Put(int num_tiles,
                      int bytes,
                      const Note& note,
                      int tile,
                      const char* from,
                      const TileNote& tile_note) {
    uint32_t begin = next_;
    next_ += max(num_tiles, 1);
    // Places are read in order. Before the first round nothing is there to be read.
    uint32_t last = next_ - 1;
    ptx::MbarrierWait(&read_[last & kLastPlace], (last / kRingTiles & 1) ^ 1);
    uint64_t* barrier = &landed_[begin & kLastPlace];
    if (threadIdx.x % kWarpSize == 0) {
      notes_[begin & kLastPlace] = note;
    }
    int place = (begin + tile) & kLastPlace;
    bool has_tile = tile >= 0 && tile < num_tiles;
    if (has_tile) tile_notes_[place] = tile_note;
    __syncwarp();  // the barrier tells of all notes
    if (threadIdx.x % kWarpSize == 0) ptx::MbarrierArriveExpectBytes(barrier, num_tiles * bytes);
    if (has_tile) ptx::BulkLoad(tiles_ + place * kTileBytes, from, bytes, barrier);
    __syncwarp();
  }

 private:
  char* tiles_;           // [kRingTiles, kTileBytes]
  uint64_t* landed_;      // [kRingTiles]
  uint64_t* read_;        // likewise
  Note* notes_;           // likewise
  TileNote* tile_notes_;  // likewise
  uint32_t next_ = 0;     // tiles put
};

// The warp that reads it: all of its lanes call.
template <typename Note, typename TileNote>
class RingReader {
 public:
  __device__ RingReader(const char* tiles, Rings<Note, TileNote>& rings)
      : tiles_(tiles + RingOfWarp() * kRingTiles * kTileBytes),
        landed_(rings.landed[RingOfWarp()]),
        read_(rings.read[RingOfWarp()]),
        notes_(rings.notes[RingOfWarp()]),
        tile_notes_(rings.tile_notes[RingOfWarp()]) {}

  // The note of the oldest group, once it has landed.
  __device__ Note Front() const {
    ptx::MbarrierWait(&landed_[first_], parities_ >> first_ & 1);
    return notes_[first_];
  }
  __device__ const uint4* Tile(int n) const {
    return reinterpret_cast<const uint4*>(tiles_ + ((first_ + n) & kLastPlace) * kTileBytes);
  }
  __device__ const TileNote& NoteOf(int n) const { return tile_notes_[(first_ + n) & kLastPlace]; }

  // When the lane has read it.
  __device__ void Pop(int num_tiles) {
    __syncwarp();
    int num_places = max(num_tiles, 1), lane = threadIdx.x % kWarpSize;
    if (lane < num_places) ptx::MbarrierArrive(&read_[(first_ + lane) & kLastPlace]);
    parities_ ^= 1u << first_;
    first_ = (first_ + num_places) & kLastPlace;
  }

 private:
  const char* tiles_;           // [kRingTiles, kTileBytes]
  uint64_t* landed_;            // [kRingTiles]
  uint64_t* read_;              // likewise
  const Note* notes_;           // likewise
  const TileNote* tile_notes_;  // likewise
  int first_ = 0;               // the oldest place
  uint32_t parities_ = 0;       // a bit a `landed`: of its next wait
};

}  // namespace
}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_TILE_RING_CUH_
