"""combine, bitwise against loops: the order of the sums, their roundings, and what is never read.

The values keep every product and sum in float32's normal range: CPUs flush smaller ones to zero.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import (
    CASES,
    MAKERS,
    NUM_RANKS,
    Case,
    assert_bitwise_equal,
    assert_close,
    each_case,
    each_implementation,
    each_size,
    make_floats,
    make_ids,
    make_priority,
    run,
    run_plan,
)

import jax_moe_ep as ep

DTYPES = (jnp.bfloat16, np.float16, np.float32)
SPREAD = Case(T=6, K=4, E=4 * NUM_RANKS, R=NUM_RANKS, A=4, H=64)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)


def routed(case, maker="uniform"):
    """A plan of the reference, with the slots and owners of the loops."""
    ids, priority = make_ids(maker, case), make_priority(case)
    expected = oracle.plan(case, ids, priority)
    return run_plan(case, ids, priority), expected["slots"], expected["owners"]


def make_rows(case, slots, dtype=np.float32, garbage=np.nan):
    """Random live rows; garbage in the padding and in the tail."""
    rows = make_floats(case.R, oracle.capacity(case), case.H, dtype=dtype)
    rows[oracle.row_sources(case, slots) < 0] = garbage
    return rows


def make_weights(case, owners, dtype=np.float32, garbage=np.nan):
    """Random weights of both signs; garbage where there is no row."""
    return np.where(
        owners < 0, np.array(garbage, dtype), make_floats(*owners.shape, dtype=dtype, seed=1)
    )


@pytest.mark.parametrize("maker", MAKERS)
@each_case("combine")
def test_sums_are_those_of_the_loops(name, maker, implementation):
    """NaN lies in all padding, in the tail and in the weights of -1, and leaks nowhere."""
    case = CASES[name]
    plan, slots, owners = routed(case, maker)
    y, weights = make_rows(case, slots), make_weights(case, owners)
    out = run(ep.combine, plan, y, weights, implementation=implementation)
    assert_bitwise_equal(out, oracle.combine(case, y, slots, owners, weights))
    assert np.isfinite(out).all()


@each_implementation("combine")
@pytest.mark.parametrize("weights_dtype", [None, np.float32, jnp.bfloat16])
@each_dtype
def test_every_dtype(dtype, weights_dtype, implementation):
    """The weights are used in float32 whatever their dtype and that of the rows."""
    plan, slots, owners = routed(SPREAD, "masked")
    y = make_rows(SPREAD, slots, dtype)
    weights = None if weights_dtype is None else make_weights(SPREAD, owners, weights_dtype)
    out = run(ep.combine, plan, y, weights, implementation=implementation)
    assert_bitwise_equal(out, oracle.combine(SPREAD, y, slots, owners, weights))


@each_implementation("combine", num_ranks=1)
@each_dtype
def test_one_rank_rounds_its_partial_too(dtype, implementation):
    """The partial is cast before the sum over ranks, also where the sum has one term."""
    case = Case(T=6, K=4, E=8, R=1, H=64)
    plan, slots, owners = routed(case)
    y, weights = make_rows(case, slots, dtype), make_weights(case, owners)
    out = run(ep.combine, plan, y, weights, implementation=implementation)
    assert_bitwise_equal(out, oracle.combine(case, y, slots, owners, weights))


@each_implementation("combine", num_ranks=1)
def test_order_of_k_by_hand(implementation):
    """One rank, one token, K = 3, rows 1e8, 1, -1e8 in the order of k, no weights.

    (1e8 + 1) - 1e8 = 0, since float32 has steps of 8 at 1e8; any other order gives 1.
    Experts 2, 0, 1 are named, so that the order of rows, 1, -1e8, 1e8, is not that of k.
    """
    case = Case(T=1, K=3, E=3, R=1)
    plan = run_plan(case, np.array([[[2, 0, 1]]], np.int32))
    y = np.array([[[1], [-1e8], [1e8]]], np.float32).repeat(4, axis=2)
    assert run(ep.combine, plan, y, implementation=implementation).tolist() == [[[0] * 4]]


@each_implementation("combine", num_ranks=4)
def test_order_of_ranks_by_hand(implementation):
    """Four ranks with one expert each; rank 0's token names them as 3, 2, 1, 0.

    Partials by rank: 1e8, 1, -1e8, 0.5. In rank order ((1e8 + 1) - 1e8) + 0.5 = 0.5; in the order
    of k it would be ((0.5 - 1e8) + 1) + 1e8 = 0.
    """
    case = Case(T=1, K=4, E=4, R=4)
    ids = np.full((4, 1, 4), -1, np.int32)
    ids[0, 0] = [3, 2, 1, 0]
    y = np.zeros((4, oracle.capacity(case), 4), np.float32)
    y[:, 0] = np.array([1e8, 1, -1e8, 0.5])[:, None]
    out = run(ep.combine, run_plan(case, ids), y, implementation=implementation)
    assert (out == out[..., :1]).all()
    assert out[..., 0].reshape(-1).tolist() == [0.5, 0, 0, 0]


@each_implementation("combine", num_ranks=2)
def test_partials_are_rounded_to_the_dtype_by_hand(implementation):
    """bf16 has 8 bits: 1 + 2^-9 rounds to 1, 1 + 2^-8 to 1 (even), 1 + 3 * 2^-9 to 1 + 2^-7.

    Rank 0 sums 1 + 2^-9 + 2^-9 = 1 + 2^-8 in float32 and rounds to 1. Rank 1 adds 2^-8 more:
    the total 1 + 2^-8 rounds to 1. Without the first rounding it would be 1 + 2^-7.
    """
    case = Case(T=1, K=4, E=8, R=2, H=8)
    ids = np.full((2, 1, 4), -1, np.int32)
    ids[0, 0] = [0, 1, 2, 4]
    y = np.zeros((2, oracle.capacity(case), 8), jnp.bfloat16)
    y[0, :3, 0] = [1, 2.0**-9, 2.0**-9]
    y[1, 0, 0] = 2.0**-8
    out = run(ep.combine, run_plan(case, ids), y, implementation=implementation)
    assert out[0, 0, 0] == 1


@each_implementation("combine", num_ranks=1)
def test_product_and_sum_are_rounded_one_by_one_by_hand(implementation):
    """w = y = 1 + 2^-12: the product 1 + 2^-11 + 2^-24 rounds to 1 + 2^-11 (even).

    Row 0 is -(1 + 2^-11) with weight 1, so the sum is 0; fused, it would be 2^-24.
    """
    case = Case(T=1, K=2, E=2, R=1)
    plan = run_plan(case, np.array([[[0, 1]]], np.int32))
    value = 1 + 2.0**-12
    y = np.array([[[-(1 + 2.0**-11)], [value]]], np.float32).repeat(4, axis=2)
    weights = np.array([[[1, value]]], np.float32)
    out = run(ep.combine, plan, y, weights, implementation=implementation)
    assert out.tolist() == [[[0] * 4]]


@each_size("combine", sorted({1, 2, NUM_RANKS}))
@each_dtype
def test_zeros_are_positive(num_ranks, dtype, implementation):
    """Sums start from +0: +0 + -0 = +0. So are tokens without rows, and partials that round to -0.

    Rows of -0, and rows whose weighted value underflows the dtype from below: -2^-30 in fp16.
    """
    case = Case(T=3, K=1, E=max(num_ranks, 2), R=num_ranks, H=8)
    ids = np.tile(np.array([0, 1, -1], np.int32)[None, :, None], (num_ranks, 1, 1))
    y = np.full((num_ranks, oracle.capacity(case), 8), -0.0, dtype)
    y[..., 4:] = -(2.0**-15)
    weights = np.full(ids.shape, 2.0**-15, np.float32)
    plan = run_plan(case, ids)
    for w in (None, weights):
        out = run(ep.combine, plan, y, w, implementation=implementation)
        expected = oracle.plan(case, ids)
        expected = oracle.combine(case, y, expected["slots"], expected["owners"], w)
        assert_bitwise_equal(out, expected)
        assert not np.signbit(out[..., :4]).any()
        assert not np.signbit(out[out == 0]).any()


@each_implementation("combine")
def test_tokens_without_rows_become_zero(implementation):
    """A8: nobody sends anything to a rank without real tokens; its result is +0, not NaN."""
    ids = make_ids("uniform", SPREAD)
    ids[1] = -1
    plan = run_plan(SPREAD, ids)
    y = make_rows(SPREAD, plan.slots)
    weights = make_weights(SPREAD, plan.owners)
    out = run(ep.combine, plan, y, weights, implementation=implementation)
    assert_bitwise_equal(out[1], np.zeros_like(out[1]))
    assert (np.delete(out, 1, axis=0) != 0).all()


@each_implementation("combine")
def test_inf_and_nan_stay_in_their_token(implementation):
    """A NaN row reaches its own token only; weight 0 times infinity is NaN as in any product."""
    plan, slots, owners = routed(SPREAD)
    y = make_rows(SPREAD, slots)
    y[1, slots[1].max()] = np.inf
    weights = make_weights(SPREAD, owners)
    token, k = np.argwhere(slots[1] == slots[1].max())[0]
    weights.reshape(-1, SPREAD.K)[token, k] = 0
    out = run(ep.combine, plan, y, weights, implementation=implementation)
    out = out.reshape(-1, SPREAD.H)
    assert np.isnan(out[token]).all()
    assert np.isfinite(np.delete(out, token, axis=0)).all()


@each_implementation("combine")
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,), (4,), (2, 3, 8)])
def test_any_shape_behind_the_rows(shape, implementation):
    """The kernels want rows of a multiple of 16 bytes, four of these numbers, and say so."""
    plan, slots, owners = routed(SPREAD)
    y = make_floats(SPREAD.R, plan.capacity, *shape)
    weights = make_weights(SPREAD, owners)
    if implementation == "cuda" and np.prod(shape) % 4:
        with pytest.raises(NotImplementedError, match="rows of a multiple of 16 bytes"):
            run(ep.combine, plan, y, weights, implementation=implementation)
        return
    out = run(ep.combine, plan, y, weights, implementation=implementation)
    assert_bitwise_equal(out, oracle.combine(SPREAD, y, slots, owners, weights))


@each_implementation("combine")
def test_dispatch_and_combine_return_k_times_x(implementation):
    """A6: atol 2e-5, rtol 1e-2, in bf16."""
    case = dataclasses.replace(SPREAD, T=64, K=8, E=32)
    plan, *_ = routed(case)
    x = make_floats(case.R, case.T, case.H, dtype=jnp.bfloat16)
    out = run(ep.combine, plan, run(ep.dispatch, plan, x), implementation=implementation)
    np.testing.assert_allclose(
        out.astype(np.float32) / case.K, x.astype(np.float32), atol=2e-5, rtol=1e-2
    )


@each_implementation("combine")
def test_the_same_bits_on_each_run(implementation):
    plan, slots, owners = routed(SPREAD, "skewed")
    y, weights = make_rows(SPREAD, slots), make_weights(SPREAD, owners)
    first = run(ep.combine, plan, y, weights, implementation=implementation)
    for _ in range(5):
        again = run(ep.combine, plan, y, weights, implementation=implementation)
        assert_bitwise_equal(again, first)


@each_implementation("combine")
@each_implementation("plan", name="planned_by")
def test_a_plan_of_any_implementation_serves(planned_by, implementation):
    ids = make_ids("masked", SPREAD)
    plan = run_plan(SPREAD, ids, implementation=planned_by)
    slots, owners = plan.slots, plan.owners
    y, weights = make_rows(SPREAD, slots), make_weights(SPREAD, owners)
    out = run(ep.combine, plan, y, weights, implementation=implementation)
    assert_bitwise_equal(out, oracle.combine(SPREAD, y, slots, owners, weights))


@each_implementation("row_weights")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_row_weights(dtype, implementation):
    """Each row's weight, 0 in padding and tail, though NaN lies at the places without rows."""
    plan, slots, owners = routed(SPREAD, "masked")
    weights = make_weights(SPREAD, owners, dtype)
    rows = run(ep.row_weights, plan, weights, implementation=implementation)
    assert_bitwise_equal(rows, oracle.row_weights(SPREAD, weights, slots))


@each_implementation("row_weights")
def test_weights_inside_the_expert_or_after_it(implementation):
    """combine(row_weights * rows) = combine(rows, weights) up to one rounding of each product."""
    plan, slots, owners = routed(SPREAD)
    y, weights = make_rows(SPREAD, slots, garbage=0), make_weights(SPREAD, owners)
    inside = run(ep.row_weights, plan, weights, implementation=implementation)[..., None] * y
    after = run(ep.combine, plan, y, weights, implementation=implementation)
    assert_close(run(ep.combine, plan, inside, implementation=implementation), after)
    assert after.any()
