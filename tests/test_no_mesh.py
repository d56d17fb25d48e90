"""The ops of a group of one without a mesh: axis_name=(), anywhere."""

import dataclasses

import jax
import numpy as np
import oracle
import pytest
from helpers import (
    AXIS,
    CASES,
    Case,
    assert_bitwise_equal,
    assert_close,
    assert_plans_equal,
    each_implementation,
    make_floats,
    make_ids,
    make_mesh,
    make_priority,
    on_ranks,
)
from jax.sharding import Mesh

import jax_moe_ep as ep

CASE = Case(T=12, K=3, E=6, R=1, A=4, distinct_experts=False)
NAMES = ("one_rank", "blocks", "capped", "priority_per_expert", "duplicates", "no_tokens")


def alone(name):
    """A case of the tests as one rank with that rank's experts."""
    case = CASES[name]
    return dataclasses.replace(case, R=1, E=case.num_local)


@each_implementation("dispatch", num_ranks=1)
@pytest.mark.parametrize("name", NAMES)
def test_all_ops_without_a_mesh(name, implementation):
    """A8, C1: each result is that of the loops for a group of one rank."""
    case = alone(name)
    config = case.config(implementation, axis_name=())
    ids, priority = make_ids("masked", case), make_priority(case)
    x, weights = make_floats(case.T, case.H), make_floats(case.T, case.K)
    y = make_floats(oracle.capacity(case), case.H, seed=1)

    @jax.jit
    def ops(ids, priority, x, y, weights):
        plan = ep.plan(ids, config, priority=priority)
        rows = ep.dispatch(x, plan)
        sources, of_rows = ep.row_sources(plan), ep.row_weights(weights, plan)
        return plan, rows, ep.combine(y, plan, weights), sources, of_rows, ep.stats(plan)

    priority = None if priority is None else priority[0]
    results = jax.device_get(ops(ids[0], priority, x, y, weights))
    plan, *moved, stats = jax.tree.map(lambda leaf: leaf[None], results)
    expected = oracle.plan(case, ids, None if priority is None else priority[None])
    slots, owners = expected["slots"], expected["owners"]
    assert_plans_equal(plan, expected)
    end = None if case.tail == "zero" else int(expected["group_sizes"].sum())
    moved[0] = moved[0][:, :end]
    for result, wanted in zip(
        moved,
        (
            oracle.dispatch(case, x[None], slots)[:, :end],
            oracle.combine(case, y[None], slots, owners, weights[None]),
            oracle.row_sources(case, slots),
            oracle.row_weights(case, weights[None], slots),
        ),
        strict=True,
    ):
        assert_bitwise_equal(result, wanted)
    assert stats.num_dropped == expected["num_dropped"]
    assert_bitwise_equal(stats.expert_counts, expected["group_counts"])


def test_eagerly_as_compiled():
    """Outside of jit too, and with NumPy arrays."""
    ids, x = make_ids("random", CASE), make_floats(CASE.T, CASE.H)
    config = CASE.config("reference", axis_name=())
    plan = ep.plan(ids[0], config)
    expected = oracle.plan(CASE, ids)
    assert_bitwise_equal(plan.slots, expected["slots"][0])
    out = ep.combine(ep.dispatch(x, plan), plan)
    rows = oracle.dispatch(CASE, x[None], expected["slots"])
    assert_bitwise_equal(out, oracle.combine(CASE, rows, expected["slots"], expected["owners"])[0])
    assert config.axes == ()
    assert ep.stats(plan).num_assignments == ids.size


@each_implementation("combine_backward", num_ranks=1)
def test_gradients_without_a_mesh_are_those_of_a_mesh_of_one(implementation):
    ids, x = make_ids("masked", CASE)[0], make_floats(CASE.T, CASE.H)
    weights, dout = make_floats(CASE.T, CASE.K), make_floats(CASE.T, CASE.H, seed=1)

    def gradients(axis_name):
        config = CASE.config(implementation, axis_name=axis_name)

        def layer(x, weights):
            plan = ep.plan(ids, config)
            rows = ep.dispatch(x, plan) * (1 + ep.row_weights(weights, plan)[:, None])
            return ep.combine(rows, plan, weights)

        return lambda x, weights, dout: jax.vjp(layer, x, weights)[1](dout)

    without = jax.jit(gradients(()))(x, weights, dout)
    within = on_ranks(gradients(AXIS), make_mesh(1))(x[None], weights[None], dout[None])
    for leaf, wanted in zip(without, within, strict=True):
        assert_bitwise_equal(leaf, wanted[0])
        assert np.asarray(leaf).any()


@each_implementation("dispatch", num_ranks=1)
def test_every_rank_of_a_mesh_by_itself(implementation):
    """Inside shard_map, with check_vma, each rank is its own group: it sees its own tokens only."""
    if implementation == "cuda" and len(jax.devices()) < 2:
        pytest.skip("needs 2 GPUs")
    case = dataclasses.replace(CASE, R=2)
    ids, x = make_ids("masked", case), make_floats(2, case.T, case.H)

    def layer(x, ids):
        rows, plan = ep.permute(x, ids, case.E, alignment=case.A, implementation=implementation)
        return ep.unpermute(rows * rows, plan), plan.slots

    def gradient(x, ids):
        return layer(x, ids), jax.grad(lambda x: layer(x, ids)[0].sum())(x)

    (out, slots), dx = on_ranks(gradient, make_mesh(2))(x, ids)
    for rank in range(2):
        expected = oracle.plan(CASE, ids[rank : rank + 1])
        assert_bitwise_equal(slots[rank], expected["slots"][0])
        num_rows = (expected["slots"][0] >= 0).sum(1, keepdims=True)
        assert_close(out[rank], num_rows * x[rank] ** 2)
        assert_close(dx[rank], 2 * num_rows * x[rank])


def test_a_layer_with_all_experts_on_every_rank():
    """moe_mlp with axis_name=(): tokens are sharded, experts are not; as with experts sharded."""
    case = Case(T=8, K=2, E=4, R=2, A=8, H=8)
    mesh = Mesh(make_mesh(2).devices, (AXIS,))
    ids = make_ids("masked", case).reshape(-1, case.K)
    x, weights = make_floats(len(ids), case.H), make_floats(*ids.shape)
    experts = make_floats(case.E, case.H, 12, seed=1), make_floats(case.E, 6, case.H, seed=2)

    def results(axis_name):
        config = case.config("auto", axis_name=axis_name)

        def layer(x, weights, *experts):
            return ep.moe_mlp(x, ids, weights, *experts, mesh=mesh, config=config)

        def step(*args):
            out, pull, stats = jax.vjp(layer, *args, has_aux=True)
            return out, stats, pull(out)

        return jax.device_get(jax.jit(step)(x, weights, *experts))

    with jax.default_matmul_precision("highest"):
        out, stats, gradients = results(())
        wanted_out, wanted_stats, wanted = results(AXIS)
    assert_close(out, wanted_out)
    for gradient, leaf in zip(gradients, wanted, strict=True):
        assert_close(gradient, leaf)
    assert_bitwise_equal(stats.expert_counts, wanted_stats.expert_counts)
    assert stats.num_assignments == ((ids >= 0) & (ids < case.E)).sum()
