// plan: what the experts of one rank may keep, and where their groups lie; by a block or a warp.

#ifndef JAX_MOE_EP_PLAN_GROUPS_CUH_
#define JAX_MOE_EP_PLAN_GROUPS_CUH_

#include "plan_params.cuh"

namespace jax_moe_ep {
namespace {

__device__ inline int32_t AlignedRows(const PlanOptions& options, int32_t rows) {
  if (options.block_for_empty) rows = max(rows, 1);
  uint32_t alignment = options.alignment;
  return static_cast<int32_t>((rows + alignment - 1) / alignment * alignment);
}

// The largest m with rows(m) <= C, where rows(m) is the sum of AlignedRows(min(wanted, m)) over the
// rank's experts: INT32_MAX when all fits.
template <typename Rows>
__device__ int32_t LargestCap(const PlanOptions& options, Rows rows) {
  if (rows(INT32_MAX) <= options.capacity) return INT32_MAX;
  // It overflows, so some expert has more than m rows, and these m rows fit in C: m <= C.
  int32_t m = 0;
#pragma unroll 1
  for (int bit = 31 - __clz(max(options.capacity, 1)); bit >= 0; --bit) {
    if (rows(m + (1 << bit)) <= options.capacity) m += 1 << bit;
  }
  return m;
}

// A team of threads has `num_items()` experts of a rank a thread: local expert `Expert(i)`, -1 for
// none, with `Demand(i)` assignments. `Sum(value)` is that of value(i) over all experts, to all
// threads; `ExclusiveSum(value, start, total)` over one i of all threads, in their order.

// The most rows that an expert of the team's rank keeps.
template <typename Team>
__device__ int32_t CapOf(const PlanParams& p, Team& team) {
  int32_t limit = p.options.expert_limit;
  int32_t cap = LargestCap(p.options, [&](int32_t m) {
    return team.Sum(
        [&](int i) { return AlignedRows(p.options, min(team.Demand(i), min(limit, m))); });
  });
  return min(cap, limit);
}

// Caps of the rank's experts; if it is this rank, its group arrays. By priority, also what an
// expert that does not overflow selects (everything), and an empty histogram for the others. This
// rank's team then calls then(cap).
template <typename Team, typename Then>
__device__ void LayoutRank(const PlanParams& p, Team& team, int rank, Then then) {
  int num_local = p.shape.num_experts / p.shape.num_ranks;
  int32_t cap = CapOf(p, team);
  for (int i = 0; i < team.num_items(); ++i) {
    if (team.Expert(i) < 0) continue;
    int expert = rank * num_local + team.Expert(i);
    p.caps[expert] = cap;
    if (!p.shape.by_priority) continue;
    bool overflows = team.Demand(i) > cap;
    p.thresholds[expert] = overflows && cap == 0 ? 0xffffffffu : 0;  // no key is that high
    p.quotas[expert] = overflows ? cap : INT32_MAX;
    for (int digit = 0; overflows && digit < kDigits; ++digit) {
      p.digits[expert * kDigits + digit] = 0;
    }
  }
  if (rank != p.shape.rank) return;

  int32_t running = 0;
  for (int i = 0; i < team.num_items(); ++i) {
    bool is_local = team.Expert(i) >= 0;
    int32_t live = min(team.Demand(i), cap);
    int32_t size = is_local ? AlignedRows(p.options, live) : 0, start, total;
    team.ExclusiveSum(size, start, total);
    if (is_local) {
      p.arrays.group_counts[team.Expert(i)] = live;
      p.arrays.group_sizes[team.Expert(i)] = size;
      p.arrays.group_starts[team.Expert(i)] = running + start;
    }
    running += total;
  }
  then(cap);
}

// The team and its cap are this rank's.
template <typename Team>
__device__ void WriteTotals(const PlanParams& p, Team& team, int32_t cap) {
  int32_t assignments = team.Sum([&](int i) { return team.Demand(i); });
  int32_t dropped = team.Sum([&](int i) { return team.Demand(i) - min(team.Demand(i), cap); });
  int32_t required = team.Sum([&](int i) { return AlignedRows(p.options, team.Demand(i)); });
  if (team.IsFirst()) {
    *p.arrays.num_assignments = assignments;
    *p.arrays.num_dropped = dropped;
    *p.arrays.required_rows = required;
  }
}

}  // namespace
}  // namespace jax_moe_ep

#endif  // JAX_MOE_EP_PLAN_GROUPS_CUH_
