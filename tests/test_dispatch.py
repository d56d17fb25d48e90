"""dispatch moves bytes: every payload, every shape, zero padding, and the tail."""

import dataclasses

import jax
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
    each_case,
    each_implementation,
    make_bits,
    make_floats,
    make_ids,
    make_priority,
    one_process,
    run,
    run_plan,
)
from jax import lax

import jax_moe_ep as ep

DTYPES = (
    jnp.bfloat16,
    jnp.float16,
    jnp.float32,
    jnp.int8,
    jnp.uint8,
    jnp.int32,
    jnp.bool_,
    jnp.float8_e4m3fn,
    jnp.float8_e5m2,
    jnp.float8_e8m0fnu,
)
SPREAD = Case(T=5, K=3, E=4 * NUM_RANKS, R=NUM_RANKS, A=4)


def routed(case, maker="uniform", seed=0):
    """A plan of the reference and what dispatch should do with it."""
    ids, priority = make_ids(maker, case, seed), make_priority(case, seed)
    plan = run_plan(case, ids, priority)
    return plan, oracle.plan(case, ids, priority)["slots"]


def assert_rows_equal(rows, case, x, plan, slots):
    """All rows with a zero tail; with an undefined one the rows before it, their padding too."""
    expected = oracle.dispatch(case, x, slots)
    assert rows.shape == expected.shape
    for rank in range(case.R):
        end = None if case.tail == "zero" else plan.group_sizes[rank].sum()
        assert_bitwise_equal(rows[rank, :end], expected[rank, :end], f"rows of rank {rank}")


@pytest.mark.parametrize("maker", MAKERS)
@each_case("dispatch")
def test_rows_are_those_of_the_loops(name, maker, implementation):
    """A5, A8: as all-gather, mask, sort would place them, with any number of real tokens."""
    case = CASES[name]
    plan, slots = routed(case, maker)
    x = make_floats(case.R, case.T, case.H)
    assert_rows_equal(
        run(ep.dispatch, plan, x, implementation=implementation), case, x, plan, slots
    )


@each_implementation("dispatch")
@pytest.mark.parametrize("A", [1, 8, 16, 32, 64, 128])
def test_alignment(A, implementation):
    """A5: bf16, fp16, fp32 and opaque bytes, all groups aligned to A, padding zero."""
    case = dataclasses.replace(SPREAD, A=A)
    plan, slots = routed(case, "skewed")
    x = {
        np.dtype(dtype).name: make_floats(case.R, case.T, 24, dtype=dtype)
        for dtype in (jnp.bfloat16, np.float16, np.float32)
    }
    x["uint8"] = make_bits(case.R, case.T, 32, dtype=np.uint8)
    rows = run(ep.dispatch, plan, x, implementation=implementation)
    assert (plan.group_sizes % A == 0).all()
    for name, leaf in x.items():
        assert_rows_equal(rows[name], case, leaf, plan, slots)


@each_implementation("dispatch")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_every_bit_pattern_arrives(dtype, implementation):
    """A5: subnormals, -0.0, infinities, every NaN; bytes 0 in the padding, for every dtype.

    float8_e8m0fnu has no zero: its byte 0 is 2^-127, which is what scales have in padding rows.
    """
    plan, slots = routed(SPREAD, "masked")
    x = make_bits(SPREAD.R, SPREAD.T, 256, dtype=dtype)
    if implementation == "cuda" and np.dtype(dtype) == bool:
        with pytest.raises(NotImplementedError, match="bytes of numbers, got bool"):
            run(ep.dispatch, plan, x, implementation=implementation)
        return
    rows = run(ep.dispatch, plan, x, implementation=implementation)
    assert_rows_equal(rows, SPREAD, x, plan, slots)


@each_implementation("dispatch")
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (2, 1, 5), (0,), (4,), (2, 3, 8)])
def test_any_shape_behind_the_tokens(shape, implementation):
    """The kernels want rows of a multiple of 16 bytes, four of these numbers, and say so."""
    plan, slots = routed(SPREAD)
    x = make_floats(SPREAD.R, SPREAD.T, *shape)
    if implementation == "cuda" and np.prod(shape) % 4:
        with pytest.raises(NotImplementedError, match="rows of a multiple of 16 bytes"):
            run(ep.dispatch, plan, x, implementation=implementation)
        return
    rows = run(ep.dispatch, plan, x, implementation=implementation)
    assert rows.shape == (SPREAD.R, plan.capacity, *shape)
    assert_rows_equal(rows, SPREAD, x, plan, slots)


@each_implementation("dispatch")
def test_a_pytree_keeps_its_structure(implementation):
    """Data with its scales and whatever else belongs to a token."""
    plan, slots = routed(SPREAD)
    x = {
        "data": make_bits(SPREAD.R, SPREAD.T, 32, dtype=jnp.float8_e4m3fn),
        "scales": (make_floats(SPREAD.R, SPREAD.T, 4), None),
        "position": make_bits(SPREAD.R, SPREAD.T, 2, 2, dtype=np.int32),
        "nothing": [],
    }
    rows = run(ep.dispatch, plan, x, implementation=implementation)
    assert jax.tree.structure(rows) == jax.tree.structure(x)
    for leaf, source in zip(jax.tree.leaves(rows), jax.tree.leaves(x), strict=True):
        assert_rows_equal(leaf, SPREAD, source, plan, slots)


@each_implementation("dispatch")
def test_several_payloads_through_one_plan(implementation):
    plan, slots = routed(SPREAD, "random")
    for seed in range(3):
        x = make_floats(SPREAD.R, SPREAD.T, SPREAD.H, seed=seed)
        rows = run(ep.dispatch, plan, x, implementation=implementation)
        assert_rows_equal(rows, SPREAD, x, plan, slots)


@each_implementation("dispatch", num_ranks=2)
def test_by_hand(implementation):
    """Rank 0 holds experts 0 and 1, A = 2. Token values are 10 * rank + token + 1, four times.

    Expert 0 gets (rank 0, t 1) = 2 and one row of padding; expert 1 gets (rank 0, t 0) = 1,
    (rank 1, t 0) = 11, (rank 1, t 1) = 12 and one of padding. C = down(4 rows + 2 experts * 1, 2).
    """
    case = Case(T=2, K=1, E=4, R=2, A=2)
    ids = np.array([[[1], [0]], [[1], [1]]], np.int32)
    x = np.array([[1, 2], [11, 12]], np.float32)[..., None].repeat(4, axis=2)
    rows = run(ep.dispatch, run_plan(case, ids), x, implementation=implementation)
    assert (rows == rows[..., :1]).all()
    assert rows[..., 0].tolist() == [[2, 0, 1, 11, 12, 0], [0, 0, 0, 0, 0, 0]]


@each_implementation("dispatch")
def test_tail_zero_wins_over_garbage_and_nan_tokens(implementation):
    """No NaN of a token that goes nowhere is ever multiplied into a row that holds nothing."""
    plan, slots = routed(SPREAD, "masked")
    x = np.full((SPREAD.R, SPREAD.T, 8), np.nan, np.float32)
    rows = run(ep.dispatch, plan, x, implementation=implementation)
    assert_rows_equal(rows, SPREAD, x, plan, slots)
    assert (rows == 0).any()


@one_process
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_reference_fills_an_undefined_tail_with_nan(dtype):
    """NaN, or -1 in integers, after the last group; zero padding inside the groups."""
    case = dataclasses.replace(SPREAD, tail="undefined")
    plan, slots = routed(case, "empty_expert")
    x = (make_floats(case.R, case.T, 4) > 0).astype(dtype)
    rows = run(ep.dispatch, plan, x)
    assert_rows_equal(rows, case, x, plan, slots)
    for rank in range(case.R):
        tail = rows[rank, plan.group_sizes[rank].sum() :]
        assert tail.size > 0
        if jnp.issubdtype(dtype, jnp.floating):
            assert np.isnan(tail.astype(np.float32)).all()
        else:
            assert_bitwise_equal(tail, np.full_like(tail, np.array(-1).astype(dtype)), "tail")


@each_implementation("dispatch")
def test_a_token_without_experts_is_sent_nowhere(implementation):
    """A8: rank 1 has no real token at all; nothing of it arrives."""
    ids = make_ids("uniform", SPREAD)
    ids[1] = -1
    plan = run_plan(SPREAD, ids)
    x = np.ones((SPREAD.R, SPREAD.T, 4), np.float32)
    x[1] = np.nan
    rows = run(ep.dispatch, plan, x, implementation=implementation)
    assert (plan.source_counts[:, 1] == 0).all()
    assert rows.sum() == 4 * (ids >= 0).sum()


@each_implementation("dispatch")
@each_implementation("plan", name="planned_by")
def test_a_plan_of_any_implementation_serves(planned_by, implementation):
    ids = make_ids("masked", SPREAD)
    plan = run_plan(SPREAD, ids, implementation=planned_by)
    x = make_floats(SPREAD.R, SPREAD.T, SPREAD.H)
    rows = run(ep.dispatch, plan, x, implementation=implementation)
    assert_rows_equal(rows, SPREAD, x, plan, oracle.plan(SPREAD, ids)["slots"])


def test_gradient_of_complex_tokens():
    """As JAX's own of a gather by row_sources; sums of two, whose order is all the same."""
    plan = ep.plan(make_ids("uniform", Case(T=6, K=2, E=4, R=1))[0], ep.EpConfig(4, ()))
    source = ep.row_sources(plan)

    def gathered(x):
        return jnp.where(source[:, None] >= 0, x[source // 2], 0)

    x = lax.complex(make_floats(6, 4), make_floats(6, 4, seed=1))
    drows = lax.complex(
        make_floats(plan.capacity, 4, seed=2), make_floats(plan.capacity, 4, seed=3)
    )
    rows, pull = jax.vjp(lambda x: ep.dispatch(x, plan), x)
    expected, pull_expected = jax.vjp(gathered, x)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(pull(drows)[0], pull_expected(drows)[0])
    assert np.abs(pull(drows)[0].imag).max() > 0
