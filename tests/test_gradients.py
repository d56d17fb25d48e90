"""The gradient of each op: exact where rows only move or scale, and zero where there is no row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import (
    CASES,
    NUM_RANKS,
    Case,
    assert_bitwise_equal,
    assert_close,
    collect,
    each_case,
    each_implementation,
    make_floats,
    make_ids,
    make_mesh,
    make_priority,
    on_ranks,
    run,
    run_plan,
    spread,
)

import jax_moe_ep as ep

SPREAD = Case(T=6, K=3, E=4 * NUM_RANKS, R=NUM_RANKS, A=4, H=32)
DROPS = dataclasses.replace(SPREAD, capacity=12)
NAMES = (
    "one_rank",
    "k_beyond_local",
    "no_tokens",
    "no_rows",
    "blocks",
    "duplicates",
    "priority_per_expert",
)
each_dtype = pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, np.float16, np.float32], ids=lambda dtype: np.dtype(dtype).name
)
each_vma = pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])


def pull_dispatch(x, plan, drows):
    return jax.vjp(lambda x: ep.dispatch(x, plan), x)[1](drows)[0]


def pull_combine(y, plan, weights, dout):
    if weights is None:
        return (*jax.vjp(lambda y: ep.combine(y, plan), y)[1](dout), None)
    return jax.vjp(lambda y, weights: ep.combine(y, plan, weights), y, weights)[1](dout)


def pull_row_weights(weights, plan, drow):
    return jax.vjp(lambda weights: ep.row_weights(weights, plan), weights)[1](drow)[0]


def routed(case, maker="masked"):
    ids, priority = make_ids(maker, case), make_priority(case)
    expected = oracle.plan(case, ids, priority)
    return run_plan(case, ids, priority), expected["slots"], expected["owners"]


def make_rows(case, slots, dtype=np.float32, seed=0):
    """Random rows with NaN in the padding and in the tail."""
    rows = make_floats(case.R, oracle.capacity(case), case.H, dtype=dtype, seed=seed)
    rows[oracle.row_sources(case, slots) < 0] = np.nan
    return rows


def make_weights(owners, dtype=np.float32):
    """Random weights with NaN where there is no row."""
    return np.where(
        owners < 0, np.array(np.nan, dtype), make_floats(*owners.shape, dtype=dtype, seed=1)
    )


def assert_rows_equal(rows, expected, plan):
    """Live rows and padding; the tail too, unless it is undefined."""
    for rank, sizes in enumerate(plan.group_sizes):
        end = sizes.sum() if plan.config.tail == "undefined" else None
        assert_bitwise_equal(rows[rank, :end], expected[rank, :end], f"rows of rank {rank}")


# The gradients of each op, against loops.


@each_case("combine", NAMES)
def test_dispatch_pulls_back_a_sum(name, implementation):
    """dx[t] sums the gradients of its rows as combine does; a token without rows gets +0.

    NaN in the gradients of padding and tail reaches nobody.
    """
    case = CASES[name]
    plan, slots, owners = routed(case, "uniform" if case.R == 1 else "masked")
    drows = make_rows(case, slots)
    x = make_floats(case.R, case.T, case.H)
    dx = run(pull_dispatch, plan, x, drows, implementation=implementation)
    assert_bitwise_equal(dx, oracle.combine(case, drows, slots, owners))


@each_case("combine_backward", NAMES)
def test_combine_pulls_back_rows_and_dots(name, implementation):
    """dy is exact, zeros in the padding included; dw is a sum over H, exact zeros without a row.

    NaN lies in y's padding and tail and in the weights of places without a row.
    """
    case = CASES[name]
    plan, slots, owners = routed(case, "uniform" if case.R == 1 else "masked")
    y, weights = make_rows(case, slots), make_weights(owners)
    dout = make_floats(case.R, case.T, case.H, seed=3)
    dy, dw = run(pull_combine, plan, y, weights, dout, implementation=implementation)
    expected_dy, expected_dw = oracle.combine_backward(case, dout, y, slots, weights)
    assert_rows_equal(dy, expected_dy, plan)
    assert_close(dw, expected_dw)
    assert_bitwise_equal(dw[owners < 0], np.zeros_like(dw[owners < 0]))


@each_implementation("combine_backward")
@each_vma
@each_dtype
def test_every_dtype(dtype, check_vma, implementation):
    """w * dout is a float32 product rounded once; dw stays float32 for bf16 and fp16 rows."""
    plan, slots, owners = routed(DROPS)
    assert (owners < 0).any()
    y, weights = make_rows(DROPS, slots, dtype), make_weights(owners)
    dout = make_floats(DROPS.R, DROPS.T, DROPS.H, dtype=dtype, seed=3)
    how = {"implementation": implementation, "check_vma": check_vma}
    dy, dw = run(pull_combine, plan, y, weights, dout, **how)
    expected_dy, expected_dw = oracle.combine_backward(DROPS, dout, y, slots, weights)
    assert_bitwise_equal(dy, expected_dy)
    assert dw.dtype == np.float32
    assert_close(dw, expected_dw)
    x = make_floats(DROPS.R, DROPS.T, DROPS.H, dtype=dtype)
    dx = run(pull_dispatch, plan, x, y, **how)
    assert_bitwise_equal(dx, oracle.combine(DROPS, y, slots, owners))


@each_implementation("combine_backward")
def test_weights_keep_their_dtype(implementation):
    plan, slots, owners = routed(SPREAD)
    y, weights = make_rows(SPREAD, slots), make_weights(owners, jnp.bfloat16)
    dout = make_floats(SPREAD.R, SPREAD.T, SPREAD.H, seed=3)
    dy, dw = run(pull_combine, plan, y, weights, dout, implementation=implementation)
    expected_dy, expected_dw = oracle.combine_backward(SPREAD, dout, y, slots, weights)
    assert_bitwise_equal(dy, expected_dy)
    assert dw.dtype == jnp.bfloat16
    assert_close(dw, expected_dw, jnp.bfloat16)


@each_implementation("dispatch")
@each_vma
def test_combine_without_weights_pulls_back_a_dispatch(check_vma, implementation):
    plan, slots, _ = routed(DROPS)
    y = make_rows(DROPS, slots)
    dout = make_floats(DROPS.R, DROPS.T, DROPS.H, seed=3)
    how = {"implementation": implementation, "check_vma": check_vma}
    dy, _ = run(pull_combine, plan, y, None, dout, **how)
    assert_bitwise_equal(dy, oracle.dispatch(DROPS, dout, slots))


@each_implementation("row_weights_backward")
@each_vma
@each_dtype
def test_row_weights_pull_back_each_row_to_its_place(dtype, check_vma, implementation):
    """dw[t, k] = drow[row of (t, k)]; +0 without a row, whatever lies in the padding."""
    plan, slots, owners = routed(DROPS)
    drow = make_rows(DROPS, slots, dtype)[..., 0]
    how = {"implementation": implementation, "check_vma": check_vma}
    dw = run(pull_row_weights, plan, make_weights(owners, dtype), drow, **how)
    expected = np.zeros(owners.shape, dtype)
    for source, t, k in np.argwhere(owners >= 0):
        rank = owners[source, t, k]
        expected[source, t, k] = drow[rank, slots[rank, source * DROPS.T + t, k]]
    assert_bitwise_equal(dw, expected)


@each_implementation("combine_backward")
@each_dtype
def test_ops_of_one_program_round_as_alone(dtype, implementation):
    """dy is rounded before the gradient of dispatch sums it, though one compiler sees both."""
    case = dataclasses.replace(SPREAD, T=32, H=64)
    plan, slots, owners = routed(case)
    y, weights = make_rows(case, slots, dtype), make_weights(owners)
    dout = make_floats(case.R, case.T, case.H, dtype=dtype, seed=3)

    def chain(y, plan, weights, dout):
        dy, _ = pull_combine(y, plan, weights, dout)
        return dy, pull_dispatch(dout, plan, dy)

    dy, dx = run(chain, plan, y, weights, dout, implementation=implementation)
    assert_bitwise_equal(dx, oracle.combine(case, dy, slots, owners))


@each_implementation("dispatch")
def test_integer_leaves_have_no_gradient(implementation):
    """jax.grad(allow_int=True) gives float0 for them, and floating leaves theirs beside."""
    plan, slots, owners = routed(SPREAD)
    config = dataclasses.replace(plan.config, implementation=implementation)
    plan = dataclasses.replace(plan, config=config)
    x = {
        "data": make_floats(SPREAD.R, SPREAD.T, SPREAD.H),
        "position": np.zeros((SPREAD.R, SPREAD.T, 4), np.int32),
    }
    factor = make_rows(SPREAD, slots, seed=4)
    mesh = make_mesh(SPREAD.R)
    x, plan, factor = spread((x, plan, factor), mesh)
    dispatch = on_ranks(ep.dispatch, mesh)

    def loss(x):
        return jnp.sum(jnp.where(jnp.isnan(factor), 0, factor * dispatch(x, plan)["data"]))

    gradient = jax.grad(loss, allow_int=True)(x)
    data = collect(gradient["data"])
    assert_bitwise_equal(data, oracle.combine(SPREAD, collect(factor), slots, owners))
    assert gradient["position"].dtype == jax.dtypes.float0
