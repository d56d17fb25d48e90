// One call of a group on one rank, whose kernel runs as threads of this process; for
// ranks.py, which starts a process a rank over memory that all of them share.

#include <cstdio>

#include "combine.h"
#include "device.h"
#include "dispatch.h"
#include "layout.h"
#include "plan_group.h"
#include "weights_group.cuh"

namespace emulated {

Block* block = nullptr;
thread_local int thread = 0;

Block::Block(int num_threads) : num_threads(num_threads), warps(num_threads / kWarp) {
  for (Warp& warp : warps) pthread_barrier_init(&warp.barrier, nullptr, kWarp);
  pthread_barrier_init(&all, nullptr, num_threads);
}

void Run(int num_threads, void (*body)(void*), void* argument) {
  Block now(num_threads);
  block = &now;
  struct Start {
    int index;
    void (*body)(void*);
    void* argument;
  };
  std::vector<Start> starts(num_threads);
  std::vector<pthread_t> threads(num_threads);
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, 128 << 10);
  for (int i = 0; i < num_threads; ++i) {
    starts[i] = {i, body, argument};
    auto run = [](void* given) -> void* {
      Start* start = static_cast<Start*>(given);
      thread = start->index;
      start->body(start->argument);
      return nullptr;
    };
    if (pthread_create(&threads[i], &attributes, run, &starts[i]) != 0) {
      fprintf(stderr, "no thread %d\n", i);
      abort();
    }
  }
  for (pthread_t& each : threads) pthread_join(each, nullptr);
}

}  // namespace emulated

using namespace jax_moe_ep;

// As ranks.py lays it out.
struct Job {
  int64_t op, rank, num_ranks, is_one_process, is_read_in_place, type, has_weights, has_bulk_copy;
  int64_t num_tokens, top_k, num_groups, alignment, capacity, zero_tail, row_bytes;
  int64_t timeout_ns, options, half_bytes, num_sms;
  char* controls;  // [num_ranks, control_bytes()]
  char* regions;   // [num_ranks, 2 * half_bytes]
  LaunchState* launch;
  Failure* failure;
  const int32_t *slots, *group_counts, *group_sizes, *group_starts, *owners;
  const char *x, *dout;
  const float* weights;
  char* out;
  float* dweights;
  const int32_t* numbers;  // of a plan: as small_plan's
  int32_t* results;        // its arrays, one behind the other
};

extern "C" {

int64_t control_bytes() { return (sizeof(Control) + 4095) / 4096 * 4096; }

int64_t half_bytes(const Job* job) {
  return RegionLayout(static_cast<Op>(job->op),
                      job->is_one_process,
                      job->has_weights,
                      static_cast<int>(job->num_ranks),
                      job->num_tokens,
                      job->top_k,
                      job->row_bytes)
      .total;
}

// Before the first call; abort: 1 + a rank that gave up, or 0; has_failed: another call of this
// rank is telling.
void set_fault(char* controls,
               int rank,
               int64_t delay_ns,
               uint32_t skips,
               uint32_t abort,
               uint32_t has_failed) {
  Control* control = reinterpret_cast<Control*>(controls + rank * control_bytes());
  control->fault = {static_cast<uint64_t>(delay_ns), skips};
  control->abort = abort;
  control->has_failed = has_failed;
}

int run(const Job* job) {
  Op op = static_cast<Op>(job->op);
  int num_ranks = static_cast<int>(job->num_ranks);
  GroupView view{};
  view.num_ranks = num_ranks;
  view.rank = static_cast<int>(job->rank);
  view.timeout_ns = job->timeout_ns;
  view.half_bytes = job->half_bytes;
  view.signature = {op,
                    static_cast<int32_t>(job->top_k),
                    job->num_tokens,
                    job->row_bytes,
                    static_cast<uint64_t>(job->options)};
  view.hash = Hash(view.signature);
  view.launch = job->launch;
  view.failure = job->failure;
  for (int peer = 0; peer < num_ranks; ++peer) {
    view.controls[peer] = reinterpret_cast<Control*>(job->controls + peer * control_bytes());
    view.regions[peer] = job->regions + peer * 2 * job->half_bytes;
    if (!job->is_read_in_place) continue;
    view.published[peer] = op == Op::kCombineBackward ? job->dout : job->x;
  }
  RowsPlan plan{job->slots,
                job->group_counts,
                job->group_sizes,
                job->group_starts,
                job->num_tokens,
                static_cast<int>(job->top_k),
                static_cast<int>(job->num_groups),
                static_cast<int>(job->alignment),
                job->capacity,
                job->zero_tail != 0};
  LaunchLimits limits{1, true, job->has_bulk_copy != 0};
  RegionLayout layout(op,
                      job->is_one_process,
                      job->has_weights,
                      num_ranks,
                      job->num_tokens,
                      job->top_k,
                      job->row_bytes);
  FloatType type = static_cast<FloatType>(job->type);
  if (op == Op::kDispatch) {
    return LaunchGroupDispatch(
        view, layout, plan, limits, job->x, job->out, job->row_bytes, nullptr);
  }
  if (op == Op::kGather) {  // x, and weights where there are some
    int count = job->has_weights ? 2 : 1;
    GatherArrays arrays{count,
                        job->num_tokens * job->row_bytes / count,
                        {job->x, job->weights},
                        {job->out, job->dweights}};
    return LaunchGroupGather(view, layout, arrays, static_cast<int>(job->num_sms), nullptr);
  }
  if (op == Op::kPlan) {  // x: ids, out: those of all ranks
    const int32_t* n = job->numbers;
    PlanShape shape{n[0], n[1], n[2], false, view.rank};
    int64_t num_local = shape.num_experts / num_ranks, num_own = shape.assignments_per_rank;
    int64_t sizes[] = {num_ranks * num_own,
                       num_own,
                       num_local,
                       num_local,
                       num_local,
                       num_ranks * num_local,
                       1,
                       1,
                       1};
    int32_t* parts[9];
    int32_t* next = job->results;
    for (int i = 0; i < 9; next += sizes[i++]) parts[i] = next;
    PlanArrays arrays{reinterpret_cast<int32_t*>(job->out),
                      nullptr,
                      parts[0],
                      parts[1],
                      parts[2],
                      parts[3],
                      parts[4],
                      parts[5],
                      parts[6],
                      parts[7],
                      parts[8],
                      nullptr};
    PlanOptions options{n[3], n[4], n[5], n[6] != 0, 1, false};
    GatherArrays gathered{1, job->num_tokens * job->row_bytes, {job->x}, {job->out}};
    if (!IsSmallPlan(shape)) return 1;
    return LaunchGroupPlan(view, layout, gathered, shape, options, arrays, nullptr);
  }
  const float* weights = job->has_weights ? job->weights : nullptr;
  if (op == Op::kCombine) {
    CombineArrays arrays{type, job->owners, job->x, weights, job->out, job->row_bytes, false};
    return LaunchGroupCombine(view, layout, plan, limits, arrays, nullptr);
  }
  CombineBackwardArrays arrays{
      type, job->owners, job->dout, job->x, weights, job->out, job->dweights, job->row_bytes};
  return LaunchGroupCombineBackward(view, layout, plan, limits, arrays, nullptr);
}

// One rank's plan by one block; 1 where plan would take several. numbers and arrays are in the
// order of PlanShape, PlanOptions and PlanArrays, without what only other plans have.
int small_plan(const int32_t* numbers, int rank, int32_t* const* arrays) {
  PlanShape shape{numbers[0], numbers[1], numbers[2], false, rank};
  PlanOptions options{numbers[3], numbers[4], numbers[5], numbers[6] != 0, 1, false};
  PlanArrays given{arrays[0],
                   nullptr,
                   arrays[1],
                   arrays[2],
                   arrays[3],
                   arrays[4],
                   arrays[5],
                   arrays[6],
                   arrays[7],
                   arrays[8],
                   arrays[9],
                   nullptr};
  if (!IsSmallPlan(shape)) return 1;
  return LaunchSmallPlan(shape, options, given, nullptr);
}

// Reads the weight of two words; 0 when they are not those of the call.
int read_weight(const uint64_t* pair, uint64_t hash, uint64_t epoch, float* weight) {
  GroupView group{};
  group.hash = hash;
  return ReadWeight(pair, WeightWords(group, epoch), weight);
}

}  // extern "C"

// What the launchers use beside.
extern "C" cudaError_t cudaGetLastError() { return cudaSuccess; }
namespace jax_moe_ep {
cudaError_t GetLaunchLimits(int64_t, bool, LaunchLimits*) { return cudaErrorNotSupported; }
// plan.cu uses CUB.
cudaError_t LoadPlan() { return cudaErrorNotSupported; }
cudaError_t LaunchPlan(const PlanShape&, const PlanOptions&, const PlanArrays&, cudaStream_t) {
  return cudaErrorNotSupported;
}
}  // namespace jax_moe_ep
