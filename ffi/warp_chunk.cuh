// Part of an array in the registers of a warp.

#ifndef JAX_MOE_EP_WARP_CHUNK_CUH_
#define JAX_MOE_EP_WARP_CHUNK_CUH_

#include "rows.cuh"

namespace jax_moe_ep {

inline constexpr int kUnitsPerLane = 4;
inline constexpr int kWarpChunk = kUnitsPerLane * kWarpSize;  // units

__host__ __device__ inline int64_t NumWarpChunks(int64_t num_units) {
  return CeilDiv(num_units, kWarpChunk);
}

// Chunk `number` of an array. All of its loads are under way before the first store: a loop that
// loads and stores by turns waits for every load, as it may read what was just stored.
template <typename Unit>
struct WarpChunk {
  int64_t begin, end;
  Unit units[kUnitsPerLane] = {};

  __device__ WarpChunk(int64_t number, int64_t num_units)
      : begin(number * kWarpChunk), end(min(begin + kWarpChunk, num_units)) {}

  __device__ int64_t At(int j) const { return begin + j * kWarpSize + threadIdx.x % kWarpSize; }

  __device__ void Load(const Unit* from) {
#pragma unroll
    for (int j = 0; j < kUnitsPerLane; ++j) {
      if (At(j) < end) units[j] = from[At(j)];
    }
  }

  __device__ void Store(Unit* to) const {
#pragma unroll
    for (int j = 0; j < kUnitsPerLane; ++j) {
      if (At(j) < end) to[At(j)] = units[j];
    }
  }
};

}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_WARP_CHUNK_CUH_
