"""Plans of a dense routing map, and the errors of maps by their text."""

import functools
import re

import numpy as np
import oracle
import pytest
from helpers import (
    CASES,
    NUM_RANKS,
    Case,
    assert_plans_equal,
    collect,
    each_implementation,
    make_floats,
    make_ids,
    make_mesh,
    on_all,
    on_ranks,
    spread,
)
from maps_oracle import gathered, make_map, rising, scattered, true_experts

import jax_moe_ep as ep


@functools.cache
def map_planner(config, top_k):
    return lambda routing_map, priority=None: ep.plan(
        routing_map, config, priority=priority, top_k=top_k
    )


def plan_of_map(case, routing_map, implementation, priority=None):
    mesh = make_mesh(case.R)
    run = on_ranks(map_planner(case.config(implementation), case.K), mesh)
    return collect(run(*spread((routing_map, priority), mesh)))


def map_of(case, ids):
    return np.stack([scattered(case, rank, np.zeros(rank.shape))[0] for rank in ids])


@each_implementation("plan")
@pytest.mark.parametrize("name", ["two_ranks", "capped", "capped_blocks", "mean_per_expert"])
def test_plan_of_a_map_is_the_plan_of_its_ids(name, implementation):
    """A1, A8: also with ranks of fewer real tokens; drops of a capacity are as without a map."""
    case = on_all(CASES[name])
    for maker in ("uniform", "masked"):
        ids = rising(case, make_ids(maker, case))
        plan = plan_of_map(case, map_of(case, ids), implementation)
        assert_plans_equal(plan, oracle.plan(case, ids))
        assert plan.top_k == case.K


@each_implementation("plan")
def test_experts_beyond_k_are_dropped_and_counted(implementation):
    """A token's experts beyond its first K count where they live, whichever rank names them.

    By loops: rank r sees all assignments of the map to its experts, and drops those beyond K.
    """
    case = Case(T=6, K=2, E=4 * NUM_RANKS, R=NUM_RANKS, A=2)
    routing_map = np.stack([make_map(case.T, case.E, seed) for seed in range(case.R)])
    ids = np.stack([true_experts(rank, case.K) for rank in routing_map])
    expected = oracle.plan(case, ids)
    for rank, token, e in np.argwhere(routing_map):
        if e not in ids[rank, token]:
            expected["num_assignments"][e // case.num_local] += 1
            expected["num_dropped"][e // case.num_local] += 1
    plan = plan_of_map(case, routing_map, implementation)
    assert_plans_equal(plan, expected)
    assert (plan.num_dropped > 0).all()
    assert plan.num_assignments.sum() == routing_map.sum()
    mesh = make_mesh(case.R)
    stats = collect(on_ranks(ep.stats, mesh)(spread(plan, mesh)))
    assert (stats.num_assignments == routing_map.sum()).all()


@each_implementation("plan")
def test_priority_of_a_map_lies_at_its_experts(implementation):
    """priority[t, e] ranks token t at expert e, as large as the map; NaN elsewhere is not read."""
    case = Case(T=8, K=2, E=4 * NUM_RANKS, R=NUM_RANKS, A=2, capacity=4, drop_policy="priority")
    ids = rising(case, make_ids("uniform", case))
    dense = make_floats(case.R, case.T, case.E)
    routing_map = map_of(case, ids)
    priority = np.stack([gathered(*pair) for pair in zip(ids, dense, strict=True)])
    expected = oracle.plan(case, ids, priority)
    assert expected["num_dropped"].any()
    dense[~routing_map] = np.nan
    assert_plans_equal(plan_of_map(case, routing_map, implementation, dense), expected)


def test_counting_what_is_cut_communicates_only_where_k_is_less_than_e():
    """The reference gathers ids; only a K below E needs the sum of an [E] over the group."""

    def text(top_k):
        config = ep.EpConfig(4, "expert", implementation="reference")
        run = on_ranks(map_planner(config, top_k), make_mesh(2))
        return run.lower(np.zeros((2, 3, 4), bool)).as_text()

    assert text(3).count("all_reduce") == 1
    assert text(4).count("all_reduce") == 0


# Errors.

IDS, MAP = np.zeros((4, 2), np.int32), np.zeros((4, 8), bool)
ALONE = ep.EpConfig(8, ())
ERRORS = {
    "map without top_k": (
        lambda: ep.plan(MAP, ALONE),
        "jax_moe_ep.plan: a routing map needs top_k, an int of at least 1, got None",
    ),
    "ids with top_k": (
        lambda: ep.plan(IDS, ALONE, top_k=2),
        "jax_moe_ep.plan: top_k=2 is given, but topk_idx int32[4, 2] has its own K. Leave top_k",
    ),
    "top_k of no experts": (
        lambda: ep.plan(MAP, ALONE, top_k=0),
        "jax_moe_ep.plan: a routing map needs top_k, an int of at least 1, got 0",
    ),
    "map of other experts": (
        lambda: ep.plan(MAP[:, 1:], ALONE, top_k=2),
        "jax_moe_ep.plan: routing_map must be [T, E] with E = 8, got shape (4, 7). Reshape",
    ),
    "map of another rank": (
        lambda: ep.plan(MAP[0], ALONE, top_k=2),
        "jax_moe_ep.plan: routing_map must be [T, E] with E = 8, got shape (8,). Reshape",
    ),
    "priority of ids": (
        lambda: ep.plan(
            MAP,
            ep.EpConfig(8, (), drop_policy="priority"),
            priority=np.zeros((4, 2), np.float32),
            top_k=2,
        ),
        "jax_moe_ep.plan: priority must have the shape of routing_map, (4, 8), got (4, 2)",
    ),
    "ids of another dtype": (
        lambda: ep.topk_to_dense(MAP, None, 8),
        "jax_moe_ep.topk_to_dense: topk_idx must be int32 or int64, got bool. dense_to_topk makes",
    ),
    "ids of another shape": (
        lambda: ep.topk_to_dense(IDS[0], None, 8),
        "jax_moe_ep.topk_to_dense: topk_idx must be [T, K] with K >= 1, got shape (2,). Reshape",
    ),
    "no number of experts": (
        lambda: ep.topk_to_dense(IDS, None, 0),
        "jax_moe_ep.topk_to_dense: num_experts must be an int of at least 1, got 0",
    ),
    "weights of another shape": (
        lambda: ep.topk_to_dense(IDS, np.zeros((4, 3), np.float32), 8),
        "topk_to_dense: topk_weights must have the shape of topk_idx, (4, 2), got (4, 3)",
    ),
    "weights of another dtype": (
        lambda: ep.topk_to_dense(IDS, IDS, 8),
        "jax_moe_ep.topk_to_dense: topk_weights must be floating, got int32",
    ),
    "map of another dtype": (
        lambda: ep.dense_to_topk(IDS, None, 2),
        "jax_moe_ep.dense_to_topk: routing_map must be bool, got int32. topk_to_dense makes a map",
    ),
    "map without experts": (
        lambda: ep.dense_to_topk(MAP[:, :0], None, 2),
        "jax_moe_ep.dense_to_topk: routing_map must be [T, E] with E >= 1, got shape (4, 0)",
    ),
    "top_k of another type": (
        lambda: ep.dense_to_topk(MAP, None, 2.0),
        "jax_moe_ep.dense_to_topk: a routing map needs top_k, an int of at least 1, got 2.0",
    ),
    "probs of another shape": (
        lambda: ep.dense_to_topk(MAP, np.zeros((4, 2), np.float32), 2),
        "jax_moe_ep.dense_to_topk: probs must have the shape of routing_map, (4, 8), got (4, 2)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_argument_and_remedy(name):
    call, text = ERRORS[name]
    with pytest.raises((TypeError, ValueError), match=re.escape(text)):
        call()
