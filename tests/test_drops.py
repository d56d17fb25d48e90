"""Which rows stay when there are too many: one cap for all, by position or by priority."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import (
    NUM_RANKS,
    Case,
    assert_bitwise_equal,
    assert_plans_equal,
    each_implementation,
    make_ids,
    make_priority,
    run,
    run_plan,
)

import jax_moe_ep as ep


@each_implementation("plan", num_ranks=2)
def test_exactly_full_works_and_one_over_is_reported(implementation):
    """Rank 0 gets 5 rows of expert 0 and 3 of expert 1; A = 4, so 8 + 4 = 12 rows.

    With C = 12 all fit. With C = 11 the largest cap with up(min(5, m), 4) + up(min(3, m), 4) <= 11
    is 4: one row of expert 0 is dropped, the last by position, and 12 rows are still required.
    """
    ids = np.full((2, 4, 2), -1, np.int32)
    ids[0, :, 0] = 0
    ids[1, 0, 0] = 0
    ids[1, 1:, 1] = 1
    full = Case(T=4, K=2, E=4, R=2, A=4, capacity=12)
    over = dataclasses.replace(full, capacity=11)
    plan = run_plan(full, ids, implementation=implementation)
    assert plan.group_counts[0].tolist() == [5, 3]
    assert plan.num_dropped.tolist() == [0, 0]
    plan = run_plan(over, ids, implementation=implementation)
    assert plan.group_counts[0].tolist() == [4, 3]
    assert plan.group_sizes[0].tolist() == [4, 4]
    assert plan.num_dropped.tolist() == [1, 0]
    assert plan.required_rows.tolist() == [12, 0]
    assert plan.num_assignments.tolist() == [8, 0]
    assert plan.owners[1, 0].tolist() == [-1, -1]
    assert (plan.owners[0, :, 0] == 0).all()


@each_implementation("plan")
@pytest.mark.parametrize("capacity", [3, 4, 7, 13, 16])
def test_nobody_is_starved(capacity, implementation):
    """One cap for all experts of a rank: an expert loses rows only if none keeps more than it.

    Also C below one block, where nothing can stay.
    """
    case = Case(T=8, K=2, E=2 * NUM_RANKS, R=NUM_RANKS, A=4, capacity=capacity)
    ids = make_ids("skewed", case)
    plan = run_plan(case, ids, implementation=implementation)
    assert_plans_equal(plan, oracle.plan(case, ids))
    demand = np.bincount(ids.reshape(-1), minlength=case.E).reshape(case.R, 2)
    for rank in range(case.R):
        kept, wanted = plan.group_counts[rank], demand[rank]
        assert (kept[kept < wanted] == kept.max()).all()
        assert plan.group_sizes[rank].sum() <= capacity


@each_implementation("plan", num_ranks=1)
def test_a_factor_is_room_for_rows_not_for_padding(implementation):
    """f = 1.0, one rank, 4 tokens, K = 1, A = 8: 4 live rows in 4 groups need 32 rows, and fit."""
    case = Case(T=4, K=1, E=4, R=1, A=8, capacity=1.0)
    ids = np.arange(4, dtype=np.int32).reshape(1, 4, 1)
    plan = run_plan(case, ids, implementation=implementation)
    assert plan.capacity == 32
    assert plan.num_dropped.tolist() == [0]


@each_implementation("plan", num_ranks=2)
@pytest.mark.parametrize(
    ("expert_capacity", "kept"), [(1, 1), (3, 3), (0.25, 1), (0.3, 2), (1.0, 4)]
)
def test_expert_capacity(expert_capacity, kept, implementation):
    """8 tokens, K = 2, E = 4: a factor f stands for ceil(f * 16 / 4) rows an expert.

    All tokens choose experts 0 and 2, and the first ones by position stay.
    """
    case = Case(T=4, K=2, E=4, R=2, expert_capacity=expert_capacity)
    ids = np.tile(np.array([0, 2], np.int32), (2, 4, 1))
    plan = run_plan(case, ids, implementation=implementation)
    assert plan.group_counts.tolist() == [[kept, 0], [kept, 0]]
    assert plan.num_dropped.tolist() == [8 - kept, 8 - kept]
    assert plan.required_rows.tolist() == [8, 8]
    is_first = np.arange(8).reshape(2, 4) < kept
    assert_bitwise_equal(plan.owners[..., 0] == 0, is_first)
    assert_bitwise_equal(plan.owners[..., 1] == 1, is_first)


@each_implementation("plan")
def test_an_expert_keeps_fewer_rows_than_its_cap_allows_the_others(implementation):
    """Both limits at once: 2 rows an expert first, then the cap of C, if still needed."""
    case = Case(T=8, K=2, E=2 * NUM_RANKS, R=NUM_RANKS, expert_capacity=4, capacity=7)
    ids = make_ids("skewed", case)
    plan = run_plan(case, ids, implementation=implementation)
    assert_plans_equal(plan, oracle.plan(case, ids))
    assert plan.group_counts.max() <= 4
    assert (plan.group_sizes.sum(1) <= 7).all()


# Priority.

PRIORITY = Case(T=6, K=1, E=2, R=1, expert_capacity=3, drop_policy="priority")


@each_implementation("plan", num_ranks=1)
@pytest.mark.parametrize(
    ("priority", "kept"),
    [
        ([0.1, 0.5, 0.3, 0.9, 0.2, 0.7], [1, 3, 5]),  # the three highest, in their own order
        ([1, 1, 1, 1, 1, 1], [0, 1, 2]),  # ties: by position
        ([1, 2, 2, 1, 1, 0], [0, 1, 2]),  # a tie for the last place
        ([np.nan, 0, np.nan, -np.inf, np.nan, -1], [1, 3, 5]),  # NaN behind -inf
        ([np.nan, np.nan, 5, np.nan, np.nan, np.nan], [0, 1, 2]),  # NaN among themselves: position
        ([-np.nan, 1, -np.nan, 1, 1, 0], [1, 3, 4]),  # whatever its sign
        ([-0.0, 0.0, -0.0, 0.0, -0.0, 0.0], [0, 1, 2]),  # one value
        ([-1, -0.0, 0.0, -0.0, 0.0, 0.0], [1, 2, 3]),
        ([np.inf, -np.inf, np.inf, 3e38, -3e38, 0], [0, 2, 3]),
        ([1e-30, -1e-30, 0, 1e-30, 2e-30, -2e-30], [0, 3, 4]),
    ],
)
def test_the_highest_priority_stays(priority, kept, implementation):
    """6 tokens of one expert that keeps 3; its rows remain in the order of the tokens."""
    ids = np.zeros((1, 6, 1), np.int32)
    priority = np.array(priority, np.float32).reshape(ids.shape)
    plan = run_plan(PRIORITY, ids, priority, implementation)
    slots = plan.slots.reshape(-1)
    assert np.flatnonzero(slots >= 0).tolist() == kept
    assert slots[kept].tolist() == [0, 1, 2]
    assert_plans_equal(plan, oracle.plan(PRIORITY, ids, priority))


@each_implementation("plan", num_ranks=2)
def test_priority_decides_across_ranks_and_k(implementation):
    """The last assignment of the last rank is the dearest: it stays, and takes the last row."""
    case = Case(T=2, K=2, E=2, R=2, capacity=2, distinct_experts=False, drop_policy="priority")
    ids = np.zeros((2, 2, 2), np.int32)
    priority = np.arange(8, dtype=np.float32).reshape(ids.shape)
    plan = run_plan(case, ids, priority, implementation)
    assert plan.slots[0].reshape(-1).tolist() == [-1] * 6 + [0, 1]
    assert plan.owners.reshape(-1).tolist() == [-1] * 6 + [0, 0]


@each_implementation("plan", num_ranks=2)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64])
def test_priority_of_any_float_is_compared_in_float32(dtype, implementation):
    """1 + 2^-30 is more than 1 in float64 but equal in float32: a tie, so position decides."""
    case = dataclasses.replace(PRIORITY, R=2)
    ids = np.zeros((2, 6, 1), np.int32)
    priority = np.full(ids.shape, 1 + 2.0**-30).astype(dtype)
    priority[0, :4] = 1
    with jax.enable_x64(True):
        plan = run_plan(case, ids, priority, implementation)
    assert np.flatnonzero(plan.slots[0] >= 0).tolist() == [0, 1, 2]


@each_implementation("plan")
def test_priority_without_a_limit_changes_nothing(implementation):
    case = Case(T=6, K=2, E=4 * NUM_RANKS, R=NUM_RANKS, drop_policy="priority")
    ids = make_ids("uniform", case)
    plan = run_plan(case, ids, make_priority(case), implementation)
    by_position = oracle.plan(dataclasses.replace(case, drop_policy="position"), ids)
    assert_plans_equal(plan, by_position)


def test_dropped_assignments_leave_dispatch_and_combine_alone():
    """Dispatch sends kept rows only, and each token sums what is left of it."""
    case = Case(T=8, K=2, E=4, R=2, A=2, capacity=6)
    ids = make_ids("skewed", case)
    plan, expected = run_plan(case, ids), oracle.plan(case, ids)
    assert expected["num_dropped"].all()
    x = np.ones((2, 8, 4), np.float32)
    rows = run(ep.dispatch, plan, x)
    assert_bitwise_equal(rows, oracle.dispatch(case, x, expected["slots"]))
    out = run(ep.combine, plan, rows)
    num_kept = (expected["owners"] >= 0).sum(-1, keepdims=True)
    assert_bitwise_equal(out, np.broadcast_to(num_kept, out.shape).astype(np.float32))
