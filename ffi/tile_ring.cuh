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
static_assert(kRingTiles <= 32, "parities are bits");
constexpr int64_t kRingBytes = int64_t{kBulkWarps} * kRingTiles * kTileBytes;  // 192 KB

// Which of a tile's vectors is vector i of this lane.
__device__ int TilePlace(int i) { return i * kWarpSize + threadIdx.x % kWarpSize; }

// Every tile comes with a note of what to do with it. The tiles that make one result are a batch;
// loads land in any order and are consumed in that of Put. All lanes of the warp call the
// functions.
template <typename Note>
struct TileRing {
  char* tiles;            // [kRingTiles, kTileBytes]
  uint64_t* barriers;     // [kRingTiles]
  Note* notes;            // [kRingTiles]
  int first = 0;          // the oldest tile
  int size = 0;           // tiles loading or loaded
  uint32_t parities = 0;  // a bit a tile: of its next wait

  __device__ void Init() {
    for (int i = threadIdx.x % kWarpSize; i < kRingTiles; i += kWarpSize) {
      ptx::MbarrierInit(&barriers[i], 1);
    }
  }

  __device__ bool IsEmpty() const { return size == 0; }
  __device__ bool IsHalfEmpty() const { return size <= kRingTiles / 2; }

  // How many tiles of a batch to put now: 0 until there is room for enough of them at once.
  __device__ int Room(int batch) const {
    int room = kRingTiles - size;
    return room >= min(batch, kRingTiles / 2) ? min(batch, room) : 0;
  }

  // Some lanes: a tile, `offset` places behind the last one. Advance follows, once for all of them.
  // 0 bytes: a note alone. `from` and bytes are multiples of 16.
  __device__ void Put(int offset, const char* from, int bytes, const Note& note) {
    int place = first + size + offset;
    if (place >= kRingTiles) place -= kRingTiles;
    notes[place] = note;  // whoever sees the barrier complete sees the note
    ptx::MbarrierArriveExpectBytes(&barriers[place], bytes);
    if (bytes == 0) return;
    ptx::BulkLoad(tiles + place * kTileBytes, from, bytes, &barriers[place]);
  }

  __device__ void Advance(int count) {
    size += count;
    __syncwarp();
  }

  // The oldest tile, once it has landed. Not when empty.
  __device__ const uint4* Front(Note* note) const {
    ptx::MbarrierWait(&barriers[first], parities >> first & 1);
    *note = notes[first];
    return reinterpret_cast<const uint4*>(tiles + first * kTileBytes);
  }

  // When all lanes have read it.
  __device__ void Pop() {
    __syncwarp();
    parities ^= 1u << first;
    first = first + 1 < kRingTiles ? first + 1 : 0;
    --size;
  }
};

}  // namespace
}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_TILE_RING_CUH_
