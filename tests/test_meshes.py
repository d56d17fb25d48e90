"""Groups of every size, over one axis or several, beside others, in any order of devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import (
    AXIS,
    DEVICES,
    Case,
    assert_bitwise_equal,
    assert_plans_equal,
    devices,
    make_floats,
    make_ids,
    on_ranks,
)
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_moe_ep as ep

BASE = Case(T=4, K=3, E=8, R=2, A=2, H=8)


def mesh_of(shape, names, reverse=False):
    found = devices(int(np.prod(shape)))
    return Mesh(np.array(found[::-1] if reverse else found).reshape(shape), names)


def layer_of(config):
    """A layer whose experts square their rows; also the plan and the rows, to compare."""

    def layer(x, ids, weights):
        plan = ep.plan(ids, config)
        rows = ep.dispatch(x, plan)
        return plan, rows, ep.combine(rows * rows, plan, weights)

    return layer


def make_inputs(case, seed=0):
    weights = make_floats(case.R, case.T, case.K, seed=seed + 1)
    x = make_floats(case.R, case.T, case.H, seed=seed)
    return x, make_ids("masked", case, seed), weights


def assert_layer_equal(results, case, x, ids, weights):
    plan, rows, out = results
    expected = oracle.plan(case, ids)
    assert_plans_equal(plan, expected)
    assert_bitwise_equal(rows, oracle.dispatch(case, x, expected["slots"]), "rows")
    squares = np.asarray(rows) * np.asarray(rows)
    sums = oracle.combine(case, squares, expected["slots"], expected["owners"], weights)
    assert_bitwise_equal(out, sums, "combined")


@pytest.mark.parametrize("R", [1, 2, 4, 8])
def test_group_sizes(R):
    case = dataclasses.replace(BASE, R=R)
    inputs = make_inputs(case)
    run = on_ranks(
        layer_of(case.config("auto" if DEVICES[0].platform == "cpu" else "reference")),
        mesh_of((R,), (AXIS,)),
    )
    assert_layer_equal(run(*inputs), case, *inputs)


@pytest.mark.parametrize("axes", [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (2, 4)])
def test_a_group_over_two_axes(shape, axes):
    """Ranks count in row-major order of the tuple, whichever axis of the mesh comes first."""
    case = dataclasses.replace(BASE, R=int(np.prod(shape)))
    inputs = make_inputs(case)
    mesh = mesh_of(shape, ("a", "b"))
    run = on_ranks(layer_of(case.config(axis_name=axes)), mesh, (axes,))
    assert_layer_equal(run(*inputs), case, *inputs)


def test_a_mesh_in_reverse_right_after_one_in_order():
    """A11: the same shapes and options on the same devices, whose ranks have changed."""
    config = BASE.config()
    inputs = make_inputs(BASE)
    layer = layer_of(config)
    for reverse in (False, True, False):
        mesh = mesh_of((2,), (AXIS,), reverse)
        plan, rows, out = on_ranks(layer, mesh)(*inputs)
        assert_layer_equal((plan, rows, out), BASE, *inputs)
        assert [s.device for s in rows.addressable_shards] == list(mesh.devices)


@pytest.mark.parametrize("names", [("data", AXIS), (AXIS, "data")])
def test_beside_a_data_axis(names):
    """Two groups of two ranks: each has its own tokens, and none sees the other's."""
    groups = [make_inputs(BASE, seed) for seed in (0, 10)]
    inputs = [np.stack(each) for each in zip(*groups, strict=True)]  # [data, expert, T, ...]
    if names[0] == AXIS:
        inputs = [np.swapaxes(each, 0, 1) for each in inputs]
    run = on_ranks(layer_of(BASE.config()), mesh_of((2, 2), names), names)
    results = jax.device_get(run(*inputs))
    for i, group in enumerate(groups):
        mine = jax.tree.map(lambda leaf, i=i: np.take(leaf, i, names.index("data")), results)
        assert_layer_equal(mine, BASE, *group)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("outer", [True, False])
def test_one_shard_map_inside_another(outer, inner, implementation):
    """The group's in that of the data axis, with and without check_vma: two groups of two ranks.

    The ops get the arguments as they are, which come with a type of the outer one.
    """
    groups = [make_inputs(BASE, seed) for seed in (0, 10)]
    inputs = [np.stack([np.concatenate(g) for g in each]) for each in zip(*groups, strict=True)]
    layer = layer_of(BASE.config(implementation))

    def of_one(*args):
        return jax.tree.map(lambda leaf: leaf[None], layer(*args))

    def of_a_group(*args):
        shard = jax.shard_map(
            of_one,
            in_specs=P(AXIS),
            out_specs=P(AXIS),
            axis_names={AXIS},
            check_vma=inner,
        )
        return jax.tree.map(lambda leaf: leaf[None], shard(*(arg[0] for arg in args)))

    run = jax.shard_map(
        of_a_group,
        mesh=mesh_of((2, 2), ("data", AXIS)),
        in_specs=P("data"),
        out_specs=P("data"),
        axis_names={"data"},
        check_vma=outer,
    )
    results = jax.device_get(jax.jit(run)(*inputs))
    for i, group in enumerate(groups):
        assert_layer_equal(jax.tree.map(lambda leaf, i=i: leaf[i], results), BASE, *group)


def test_stats_over_the_group_and_the_data_axis():
    """The plan differs along `data`, which stats sees under check_vma and is told without."""
    ids = np.stack([make_ids("masked", BASE, seed) for seed in (0, 1)])
    expected = [oracle.plan(BASE, each) for each in ids]
    counts = sum(plan["group_counts"].reshape(-1) for plan in expected)
    mesh = mesh_of((2, 2), ("data", AXIS))
    for check_vma, axis_name in ((True, ()), (True, "data"), (False, ("data",))):
        stats = jax.jit(
            jax.shard_map(
                lambda ids, axis_name=axis_name: ep.stats(
                    ep.plan(ids[0, 0], BASE.config()), axis_name=axis_name
                ),
                mesh=mesh,
                in_specs=P("data", AXIS),
                out_specs=P(),
                check_vma=check_vma,
            )
        )(ids)
        assert stats.expert_counts.tolist() == counts.tolist()
        assert stats.num_assignments == sum(plan["num_assignments"].sum() for plan in expected)
        assert stats.required_rows == max(plan["required_rows"].max() for plan in expected)


@pytest.mark.parametrize("check_vma", [True, False])
def test_beside_a_tensor_axis(check_vma):
    """The rows' columns are sharded over `tensor`: each result is a slice of the whole."""
    x, ids, weights = make_inputs(BASE)
    layer = layer_of(BASE.config())
    spec = P(AXIS, None, "tensor")
    run = jax.shard_map(
        lambda x, ids, weights: layer(x[0], ids[0], weights[0])[2][None],
        mesh=mesh_of((2, 2), (AXIS, "tensor")),
        in_specs=(spec, P(AXIS), P(AXIS)),
        out_specs=spec,
        check_vma=check_vma,
    )
    out = jax.jit(run)(x, ids, weights)
    expected = oracle.plan(BASE, ids)
    rows = oracle.dispatch(BASE, x, expected["slots"])
    sums = oracle.combine(BASE, rows * rows, expected["slots"], expected["owners"], weights)
    assert_bitwise_equal(out, sums)


def test_gradient_beside_a_tensor_axis():
    """Weights replicated over `tensor`: their gradient is the dot over all columns, on both."""
    x, ids, weights = make_inputs(BASE)
    layer = layer_of(BASE.config())
    spec = P(AXIS, None, "tensor")

    def total(x, ids, weights):
        return jax.lax.psum(jnp.sum(layer(x[0], ids[0], weights[0])[2]), (AXIS, "tensor"))

    run = jax.shard_map(
        total,
        mesh=mesh_of((2, 2), (AXIS, "tensor")),
        in_specs=(spec, P(AXIS), P(AXIS)),
        out_specs=P(),
    )
    dw = jax.jit(jax.grad(run, 2))(x, ids, weights)
    is_kept = oracle.plan(BASE, ids)["owners"] >= 0
    expected = np.where(is_kept, np.sum(x.astype(np.float64) ** 2, -1, keepdims=True), 0)
    np.testing.assert_allclose(dw, expected, rtol=1e-5)


def test_two_groups_in_one_program():
    """A10: a group over `a` and a group over `b`, one after the other, in one jit."""
    ids = np.stack([make_ids("uniform", BASE, seed) for seed in (0, 1)])  # [a, b, T, K]
    x = make_floats(2, 2, BASE.T, BASE.H)
    configs = [BASE.config(axis_name=axis) for axis in ("a", "b")]

    def both(x, ids):
        for config in configs:
            plan = ep.plan(ids, config)
            x = ep.combine(ep.dispatch(x, plan), plan)
        return x

    out = on_ranks(both, mesh_of((2, 2), ("a", "b")), ("a", "b"))(x, ids)
    assert_bitwise_equal(out, x * np.float32(BASE.K) * np.float32(BASE.K))
