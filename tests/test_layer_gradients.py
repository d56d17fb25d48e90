"""Gradients of whole layers: closed forms, replicated operands, scan and checkpoint, twice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import (
    AXIS,
    Case,
    assert_bitwise_equal,
    assert_close,
    make_floats,
    make_ids,
    make_mesh,
    on_ranks,
    run_plan,
)
from jax.sharding import PartitionSpec as P

import jax_moe_ep as ep

SPREAD = Case(T=6, K=3, E=8, R=2, A=4, H=32)
DROPS = dataclasses.replace(SPREAD, capacity=12)
each_vma = pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])


def scaled_by_expert(x, ids, weights, config):
    """out[t] = sum over k of w[t, k] * (e + 1) * x[t] for the kept experts e of t."""
    plan = ep.plan(ids, config)
    rows = ep.dispatch(x, plan)
    expert = jnp.searchsorted(jnp.cumsum(plan.group_sizes), jnp.arange(plan.capacity), side="right")
    expert += jax.lax.axis_index(config.axis_name) * plan.num_local_experts
    return ep.combine(rows * (expert[:, None] + 1), plan, weights)


def expected_gradients(case, x, ids, weights, dout):
    """dx[t] = dout[t] * sum over k of w * (e+1); dw[t, k] = (e+1) * <x[t], dout[t]>; 0 dropped."""
    owners = oracle.plan(case, ids)["owners"]
    factor = np.where(owners >= 0, ids + 1.0, 0)
    dx = dout.astype(np.float64) * np.sum(factor * weights, -1, keepdims=True)
    dw = factor * np.sum(x.astype(np.float64) * dout, -1, keepdims=True)
    return dx, dw


@each_vma
@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("case", [SPREAD, DROPS], ids=["kept", "dropped"])
def test_closed_form_of_a_layer(case, where, check_vma):
    """Differentiated outside shard_map, or inside on each rank's own loss."""
    config, mesh = case.config("auto"), make_mesh(case.R)
    ids = make_ids("masked", case)
    x, dout = make_floats(case.R, case.T, case.H), make_floats(case.R, case.T, case.H, seed=3)
    weights = make_floats(case.R, case.T, case.K, seed=1)

    def loss(x, weights, ids, dout):
        return jnp.sum(scaled_by_expert(x, ids, weights, config) * dout)

    if where == "inside":
        dx, dw = on_ranks(jax.grad(loss, (0, 1)), mesh, check_vma=check_vma)(x, weights, ids, dout)
    else:
        total = on_ranks(loss, mesh, check_vma=check_vma)
        dx, dw = jax.jit(jax.grad(lambda *args: total(*args).sum(), (0, 1)))(x, weights, ids, dout)
    expected_dx, expected_dw = expected_gradients(case, x, ids, weights, dout)
    assert_close(dx, expected_dx)
    assert_close(dw, expected_dw)


@pytest.mark.parametrize("replicated", ["x", "weights", "both"])
def test_replicated_operands_get_the_sum_over_ranks(replicated):
    """x or the weights enter through P(): under check_vma their gradient is one array, the sum."""
    case, mesh = SPREAD, make_mesh(2)
    config = case.config("auto")
    ids = make_ids("masked", case)
    dout = make_floats(case.R, case.T, case.H, seed=3)
    x = make_floats(case.R, case.T, case.H)
    weights = make_floats(case.R, case.T, case.K, seed=1)
    is_same = {"x": replicated != "weights", "weights": replicated != "x"}
    if is_same["x"]:
        x[1] = x[0]
    if is_same["weights"]:
        weights[1] = weights[0]
    specs = (P() if is_same["x"] else P(AXIS), P() if is_same["weights"] else P(AXIS))

    def loss(x, weights, ids, dout):
        out = scaled_by_expert(x[0], ids[0], weights[0], config)
        return jax.lax.psum(jnp.sum(out * dout[0]), AXIS)

    total = jax.shard_map(loss, mesh=mesh, in_specs=(*specs, P(AXIS), P(AXIS)), out_specs=P())
    one = {name: slice(1) if same else slice(None) for name, same in is_same.items()}
    gradient = jax.jit(jax.grad(total, (0, 1)))
    dx, dw = gradient(x[one["x"]], weights[one["weights"]], ids, dout)
    expected_dx, expected_dw = expected_gradients(case, x, ids, weights, dout)
    assert_close(dx, expected_dx.sum(0, keepdims=True) if is_same["x"] else expected_dx)
    assert_close(dw, expected_dw.sum(0, keepdims=True) if is_same["weights"] else expected_dw)


def test_scan_of_checkpointed_layers():
    """Two layers, each but its plan recomputed in the backward: the gradient of a plain loop."""
    case, mesh = SPREAD, make_mesh(2)
    config = case.config("auto")
    ids = np.stack([make_ids("masked", case, seed) for seed in range(2)], 1)  # [R, 2, T, K]
    x = make_floats(case.R, case.T, case.H)
    weights = np.stack([make_floats(case.R, case.T, case.K, seed=s) for s in range(2)], 1)

    def layer(x, ids, weights):
        plan = ep.plan(ids, config)
        return x + ep.combine(jnp.tanh(ep.dispatch(x, plan)), plan, weights)

    def looped(x, weights, ids):
        for i in range(2):
            x = layer(x, ids[i], weights[i])
        return jnp.sum(x * x)

    def scanned(x, weights, ids):
        kept = jax.checkpoint_policies.save_only_these_names("ep_plan")
        step = jax.checkpoint(lambda x, each: (layer(x, *each), None), policy=kept)
        return jnp.sum(jnp.square(jax.lax.scan(step, x, (ids, weights))[0]))

    plain = on_ranks(jax.grad(looped, (0, 1)), mesh)(x, weights, ids)
    again = on_ranks(jax.grad(scanned, (0, 1)), mesh)(x, weights, ids)
    for actual, expected in zip(again, plain, strict=True):
        assert_close(actual, expected)


# Twice.


def test_second_order_without_weights_works():
    """combine(dispatch(x)) = K*x, so the gradient of |K*x|^2 / 2 is K^2*x and that one's K^2."""
    case, mesh = dataclasses.replace(SPREAD, H=4), make_mesh(2)
    ids = make_ids("uniform", case)

    def total(x, ids):
        plan = ep.plan(ids, case.config())
        return jnp.sum(jnp.square(ep.combine(ep.dispatch(x, plan), plan))) / 2

    def slope(x, ids):
        return jnp.sum(jax.grad(total)(x, ids))

    x = make_floats(case.R, case.T, case.H)
    second = on_ranks(jax.grad(slope), mesh)(x, ids)
    assert_bitwise_equal(second, np.full(x.shape, case.K**2, np.float32))


def test_second_order_with_weights_raises():
    """combine with weights is differentiable once: its backward has no gradient of its own."""
    case, mesh = dataclasses.replace(SPREAD, H=4), make_mesh(2)
    ids = make_ids("uniform", case)

    def total(x, weights, ids):
        plan = ep.plan(ids, case.config())
        return jnp.sum(jnp.square(ep.combine(ep.dispatch(x, plan), plan, weights)))

    def slope(x, weights, ids):
        return jnp.sum(jax.grad(total)(x, weights, ids))

    x, weights = make_floats(case.R, case.T, 4), make_floats(case.R, case.T, case.K)
    with pytest.raises(ValueError, match="does not support reverse-mode autodiff"):
        on_ranks(jax.grad(slope), mesh)(x, weights, ids)


def test_forward_mode_is_refused_by_jax():
    plan = run_plan(SPREAD, make_ids("uniform", SPREAD))
    x = make_floats(SPREAD.R, SPREAD.T, 4)
    dispatch = on_ranks(ep.dispatch, make_mesh(SPREAD.R))
    with pytest.raises(TypeError, match="forward-mode autodiff"):
        jax.jvp(lambda x: dispatch(x, plan), (x,), (x,))
