// Enough of CUDA's device language to run a block of a kernel as threads of the host, for testing
// logic without a GPU. Included before everything else; the files beside replace those of ffi/ that
// hold PTX. Memory is the host's, and stronger than a GPU's: this finds no missing fence.

#ifndef JAX_MOE_EP_TESTS_DEVICE_H_
#define JAX_MOE_EP_TESTS_DEVICE_H_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <sched.h>
#include <vector_functions.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <type_traits>
#include <vector>

#undef __device__
#undef __global__
#undef __host__
#undef __shared__
#undef __grid_constant__
#undef __launch_bounds__
#undef __align__
#undef __noinline__
#define __device__
#define __global__
#define __host__
#define __shared__ static  // a process runs one block at a time
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __noinline__ __attribute__((noinline))

namespace emulated {

inline constexpr int kWarp = 32;

// What the threads of a warp, and of a block, do together.
struct Warp {
  pthread_barrier_t barrier;
  uint64_t slots[kWarp];
};

// A barrier of as many threads as the last argument says, like PTX's.
struct NamedBarrier {
  std::mutex mutex;
  std::condition_variable changed;
  int num_waiting = 0;
  int64_t generation = 0;
  bool is_true = true, result = true;

  // Whether the value is true in all threads.
  bool Wait(int num_threads, bool value) {
    std::unique_lock<std::mutex> lock(mutex);
    is_true &= value;
    if (++num_waiting == num_threads) {
      result = is_true;
      is_true = true;
      num_waiting = 0;
      ++generation;
      changed.notify_all();
      return result;
    }
    changed.wait(lock, [this, now = generation] { return generation != now; });
    return result;
  }
};

struct Block {
  explicit Block(int num_threads);
  int num_threads;
  std::vector<Warp> warps;
  pthread_barrier_t all;
  NamedBarrier all_and;
  NamedBarrier named[16];
};

extern Block* block;
extern thread_local int thread;

struct Index {
  int x;
};
inline Index ThreadIdx() { return {thread}; }
inline Index BlockDim() { return {block->num_threads}; }

inline Warp& ThisWarp() { return block->warps[thread / kWarp]; }
inline int Lane() { return thread % kWarp; }
inline void SyncWarp() { pthread_barrier_wait(&ThisWarp().barrier); }

// Every lane gives a value and gets what use(values) makes of all.
template <typename T, typename Use>
auto Together(T value, Use use) {
  Warp& warp = ThisWarp();
  static_assert(sizeof(T) <= sizeof(uint64_t));
  memcpy(&warp.slots[Lane()], &value, sizeof(T));
  SyncWarp();
  auto result = use([&](int lane) {
    T other;
    memcpy(&other, &warp.slots[lane], sizeof(T));
    return other;
  });
  SyncWarp();
  return result;
}

// Runs kernel(params) as one block of num_threads, and returns when all of them have.
void Run(int num_threads, void (*body)(void*), void* argument);

template <typename Params>
void Launch(void (*kernel)(Params), int num_threads, std::remove_const_t<Params>& params) {
  struct Call {
    void (*kernel)(Params);
    std::remove_const_t<Params>* params;
  } call{kernel, &params};
  Run(
      num_threads,
      [](void* argument) {
        Call* call = static_cast<Call*>(argument);
        call->kernel(*call->params);
      },
      &call);
}

}  // namespace emulated

using std::isnan;

#define threadIdx (emulated::ThreadIdx())
#define blockDim (emulated::BlockDim())
#define blockIdx (emulated::Index{0})
#define gridDim (emulated::Index{1})

inline void __syncthreads() { pthread_barrier_wait(&emulated::block->all); }
inline int __syncthreads_and(int value) {
  return emulated::block->all_and.Wait(emulated::block->num_threads, value != 0);
}
inline void __syncwarp() { emulated::SyncWarp(); }
inline void __nanosleep(unsigned) { sched_yield(); }
inline void __threadfence_system() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }

template <typename T>
T __reduce_or_sync(unsigned, T value) {
  return emulated::Together(value, [](auto get) {
    T bits = 0;
    for (int lane = 0; lane < emulated::kWarp; ++lane) bits |= get(lane);
    return bits;
  });
}

inline unsigned __ballot_sync(unsigned, bool value) {
  return emulated::Together(value, [](auto get) {
    unsigned bits = 0;
    for (int lane = 0; lane < emulated::kWarp; ++lane) bits |= unsigned{get(lane)} << lane;
    return bits;
  });
}
template <typename T>
unsigned __match_any_sync(unsigned, T value) {
  return emulated::Together(value, [=](auto get) {
    unsigned bits = 0;
    for (int lane = 0; lane < emulated::kWarp; ++lane) bits |= unsigned{get(lane) == value} << lane;
    return bits;
  });
}
inline bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return emulated::Together(value, [=](auto get) { return get(source); });
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  int source = emulated::Lane() ^ mask;
  return emulated::Together(value, [=](auto get) { return get(source); });
}

template <typename T>
T __shfl_up_sync(unsigned, T value, int distance) {
  int source = std::max(emulated::Lane() - distance, 0);
  return emulated::Together(value, [=](auto get) { return get(source); });
}

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

inline int atomicAdd(int32_t* address, int32_t value) {
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}
inline unsigned atomicExch(uint32_t* address, uint32_t value) {
  return __atomic_exchange_n(address, value, __ATOMIC_SEQ_CST);
}
inline unsigned atomicCAS(uint32_t* address, uint32_t expected, uint32_t value) {
  __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return expected;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
// Compiled with -ffp-contract=off.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }

template <typename A, typename B>
auto min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return std::min<T>(a, b);
}
template <typename A, typename B>
auto max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return std::max<T>(a, b);
}

#endif  // JAX_MOE_EP_TESTS_DEVICE_H_
