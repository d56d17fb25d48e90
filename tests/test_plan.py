"""Every array of the plan, on every rank, against loops; small examples worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import (
    AXIS,
    CASES,
    MAKERS,
    NUM_RANKS,
    Case,
    assert_bitwise_equal,
    assert_plans_equal,
    each_case,
    each_implementation,
    make_ids,
    make_mesh,
    make_priority,
    on_all,
    on_ranks,
    one_process,
    planner,
    run,
    run_plan,
)

import jax_moe_ep as ep

TWO_RANKS = Case(T=2, K=2, E=4, R=2, A=4)


@pytest.mark.parametrize("maker", MAKERS)
@each_case("plan")
def test_every_array_is_that_of_the_loops(name, maker, implementation):
    """A5, A8: order (local expert, source rank, token, k); ranks with any number of real tokens."""
    case = CASES[name]
    ids, priority = make_ids(maker, case), make_priority(case)
    plan = run_plan(case, ids, priority, implementation)
    assert_plans_equal(plan, oracle.plan(case, ids, priority))
    assert plan.capacity == oracle.capacity(case)
    assert (plan.num_ranks, plan.num_tokens, plan.top_k) == (case.R, case.T, case.K)
    assert plan.num_local_experts == case.num_local
    assert plan.config == case.config(implementation)


@each_implementation("plan", num_ranks=2)
def test_by_hand(implementation):
    """Two ranks, two tokens each, experts 0 and 1 on rank 0, 2 and 3 on rank 1, A = 4.

    rank 0: token 0 -> 1, 3; token 1 -> 1, nobody.    rank 1: token 0 -> 3, 1; token 1 -> 0, 4.
    Expert 0: 1 row. Expert 1: 3 rows, of (rank 0, t 0), (rank 0, t 1), (rank 1, t 0).
    Expert 3: 2 rows. 4 is no expert. On rank 0 expert 1 starts behind one block of 4.
    """
    ids = np.array([[[1, 3], [1, -1]], [[3, 1], [0, 4]]], np.int32)
    plan = run_plan(TWO_RANKS, ids, implementation=implementation)
    assert plan.slots.tolist() == [
        [[4, -1], [5, -1], [-1, 6], [0, -1]],
        [[-1, 0], [-1, -1], [1, -1], [-1, -1]],
    ]
    assert plan.owners.tolist() == [[[0, 1], [0, -1]], [[1, 0], [0, -1]]]
    assert plan.group_counts.tolist() == [[1, 3], [0, 2]]
    assert plan.group_sizes.tolist() == [[4, 4], [0, 4]]
    assert plan.group_starts.tolist() == [[0, 4], [0, 0]]
    assert plan.source_counts.tolist() == [[[0, 2], [1, 1]], [[0, 1], [0, 1]]]
    assert plan.num_assignments.tolist() == [4, 2]
    assert plan.num_dropped.tolist() == [0, 0]
    assert plan.required_rows.tolist() == [8, 4]
    assert plan.capacity == 8  # 2 experts of at most 4 tokens


@each_implementation("plan", num_ranks=2)
def test_an_empty_group_takes_no_rows_or_one_block(implementation):
    """All 4 tokens choose expert 1: with a block for expert 0 its rows start at 4, else at 0."""
    ids = np.full((2, 2, 2), -1, np.int32)
    ids[..., 0] = 1
    none = run_plan(TWO_RANKS, ids, implementation=implementation)
    block = run_plan(
        Case(T=2, K=2, E=4, R=2, A=4, empty_groups="block"), ids, implementation=implementation
    )
    assert none.group_sizes.tolist() == [[0, 4], [0, 0]]
    assert block.group_sizes.tolist() == [[4, 4], [4, 4]]
    assert none.group_starts[0].tolist() == [0, 0]
    assert block.group_starts[0].tolist() == [0, 4]
    assert none.required_rows.tolist() == [4, 0]
    assert block.required_rows.tolist() == [8, 8]
    assert none.group_counts.tolist() == block.group_counts.tolist() == [[0, 4], [0, 0]]


@each_implementation("plan", num_ranks=1)
def test_an_expert_named_twice_gets_two_rows(implementation):
    """One token names expert 1 three times: rows 0, 1, 2 in the order of k."""
    case = Case(T=1, K=4, E=2, R=1, distinct_experts=False)
    plan = run_plan(case, np.array([[[1, 1, -1, 1]]], np.int32), implementation=implementation)
    assert plan.slots.tolist() == [[[0, 1, -1, 2]]]
    assert plan.group_counts.tolist() == [[0, 3]]


@each_implementation("plan", num_ranks=2)
def test_int64_ids_are_checked_before_they_are_narrowed(implementation):
    """2^32 + 1 and -2^32 + 1 are no experts, though their low 32 bits are those of expert 1."""
    case = Case(T=2, K=2, E=4, R=2)
    ids = np.array([[[2**32 + 1, 1], [2, -(2**63)]], [[-(2**32) + 1, 3], [0, 2**63 - 1]]])
    small = np.where((ids >= 0) & (ids < 4), ids, -1).astype(np.int32)
    with jax.enable_x64(True):
        wide = run_plan(case, ids, implementation=implementation)
        run_wide = on_ranks(planner(case.config(implementation)), make_mesh(2))
        assert run_wide.trace(ids, None).jaxpr.in_avals[0].dtype == np.int64
    assert_plans_equal(wide, oracle.plan(case, small))


@each_implementation("plan")
def test_int64_ids_of_a_larger_case(implementation):
    case = on_all(CASES["two_ranks"])
    ids = make_ids("masked", case).astype(np.int64)
    with jax.enable_x64(True):
        plan = run_plan(case, ids, implementation=implementation)
    assert_plans_equal(plan, oracle.plan(case, ids))


@each_implementation("plan")
def test_a_large_batch(implementation):
    """Enough tokens for several blocks of a kernel, with uneven counts."""
    case = Case(T=517, K=8, E=32 * NUM_RANKS, R=NUM_RANKS, A=16, capacity=1.25)
    ids = make_ids("skewed", case)
    plan = run_plan(case, ids, implementation=implementation)
    expected = oracle.plan(case, ids)
    assert_plans_equal(plan, expected)
    assert expected["num_dropped"].any()


@pytest.mark.parametrize("name", CASES)
def test_row_sources_invert_slots(name):
    case = CASES[name]
    ids, priority = make_ids("random", case), make_priority(case)
    plan = run_plan(case, ids, priority)
    sources = run(ep.row_sources, plan)
    assert_bitwise_equal(sources, oracle.row_sources(case, plan.slots))
    assert ((sources >= 0).sum(1) == plan.group_counts.sum(1)).all()


def test_rows_of_a_group_are_contiguous_and_in_the_order_of_their_sources():
    """A5: sources rise within each group; the rest of the group, and the tail, hold nobody."""
    case = CASES["k_beyond_local"]
    plan = run_plan(case, make_ids("uniform", case))
    sources = run(ep.row_sources, plan)
    for rank in range(case.R):
        is_live = np.zeros(plan.capacity, bool)
        for start, count in zip(plan.group_starts[rank], plan.group_counts[rank], strict=True):
            group = sources[rank, start : start + count]
            assert (np.diff(group) > 0).all()
            assert (group >= 0).all()
            assert start % case.A == 0
            is_live[start : start + count] = True
        assert (sources[rank, ~is_live] == -1).all()


def test_stats_are_totals_over_all_ranks():
    case = CASES["capped"]
    ids = make_ids("skewed", case)
    plan = run_plan(case, ids)
    stats = run(ep.stats, plan)
    for rank in range(case.R):
        assert stats.num_assignments[rank] == plan.num_assignments.sum() == ids.size
        assert stats.num_dropped[rank] == plan.num_dropped.sum() > 0
        assert stats.required_rows[rank] == plan.required_rows.max()
        assert stats.expert_counts[rank].tolist() == plan.group_counts.reshape(-1).tolist()
    assert all(leaf.dtype == np.int32 for leaf in jax.tree.leaves(stats))


def test_stats_may_leave_through_a_replicated_output():
    case = CASES["capped"]
    config, mesh = case.config(), make_mesh(case.R)
    ids = make_ids("uniform", case)
    total = jax.jit(
        jax.shard_map(
            lambda ids: ep.stats(ep.plan(ids[0], config)),
            mesh=mesh,
            in_specs=jax.P(AXIS),
            out_specs=jax.P(),
        )
    )(ids)
    counts = oracle.plan(case, ids)["group_counts"]
    assert total.expert_counts.tolist() == counts.reshape(-1).tolist()
    assert total.num_assignments.shape == ()


def test_a_plan_is_a_pytree_of_int32_arrays():
    case = CASES["two_ranks"]
    plan = run_plan(case, make_ids("uniform", case))
    leaves, treedef = jax.tree.flatten(plan)
    assert len(leaves) == len(oracle.LEAVES)
    assert all(leaf.dtype == jnp.int32 for leaf in leaves)
    again = treedef.unflatten(leaves)
    assert (again.config, again.capacity) == (plan.config, plan.capacity)


@one_process
def test_auto_is_the_reference_where_there_is_no_cuda():
    """On the CPU devices, which every machine has, whatever the default backend."""
    cpu = jax.sharding.Mesh(np.array(jax.devices("cpu")[:2]), (AXIS,))
    case = CASES["two_ranks"]
    ids = make_ids("masked", case)
    plan = on_ranks(planner(case.config("auto")), cpu)(ids, None)
    assert_plans_equal(plan, oracle.plan(case, ids))


def test_no_gradient_flows_through_a_plan():
    """The priority may come from the router: its gradient through the plan is zero."""
    case = CASES["priority_per_expert"]
    ids, mesh = make_ids("uniform", case), make_mesh(case.R)

    def rows(ids, priority):
        plan = ep.plan(ids, case.config(), priority=priority)
        return jnp.sum(plan.slots.astype(jnp.float32)) * jnp.ones(1) + priority[0, 0]

    f = on_ranks(rows, mesh)
    priority = np.random.default_rng(0).random(ids.shape).astype(np.float32)
    gradient = jax.grad(lambda p: f(ids, p).sum())(priority)
    expected = np.zeros(ids.shape, np.float32)
    expected[:, 0, 0] = 1
    assert_bitwise_equal(gradient, expected)
