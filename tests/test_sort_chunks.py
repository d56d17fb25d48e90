"""sort_chunks against loops: any sizes, its inverse and its gradient."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import (
    Case,
    assert_bitwise_equal,
    each_implementation,
    make_bits,
    make_floats,
    make_ids,
    run_plan,
)

import jax_moe_ep as ep
from jax_moe_ep import permutation


def sorted_by_loops(x, sizes, order):
    """The rows of the chunks in their order, then zeros; and the sizes, cut at N rows."""
    ends, total = [], 0
    for size in sizes:
        total = min(total + max(int(size), 0), len(x))
        ends.append(total)
    starts = [0, *ends[:-1]]
    places = [row for m in order for row in range(starts[m], ends[m])]
    out = np.zeros_like(x)
    out[: len(places)] = x[places]
    return out, np.array([ends[m] - starts[m] for m in order], np.int32), places


def make_chunks(seed, num_rows=24, num_chunks=7):
    """Sizes, some 0, with a sum of at most N, and an order."""
    random = np.random.default_rng(seed)
    total = num_rows if seed % 2 else random.integers(num_rows + 1)
    ends = np.sort(random.integers(0, total + 1, num_chunks - 1))
    sizes = np.diff(ends, prepend=0, append=total).astype(np.int32)
    sizes[random.integers(num_chunks)] = 0
    return sizes, random.permutation(num_chunks).astype(np.int32)


@each_implementation("dispatch", num_ranks=1)
def test_chunks_are_sorted_as_by_the_loops(implementation):
    """C1, C2: any bits of a pytree move; one program for all sizes and orders; the tail is zero.

    The inverse brings every row back that lies in a chunk.
    """
    leaves = {
        dtype: make_bits(24, 16, dtype=dtype) for dtype in ("float32", "bfloat16", "uint8", "int32")
    }

    def there_and_back(leaves, sizes, order):
        rows, sorted_sizes = ep.sort_chunks(leaves, sizes, order, implementation=implementation)
        back, sizes = ep.sort_chunks(
            rows, sorted_sizes, jnp.argsort(order), implementation=implementation
        )
        return rows, sorted_sizes, back, sizes

    run = jax.jit(there_and_back)
    for seed in range(12):
        sizes, order = make_chunks(seed)
        rows, sorted_sizes, back, sizes_back = run(leaves, sizes, order)
        assert_bitwise_equal(sizes_back, sizes)
        for dtype, leaf in leaves.items():
            wanted, wanted_sizes, _ = sorted_by_loops(leaf, sizes, order)
            assert_bitwise_equal(rows[dtype], wanted, dtype)
            assert_bitwise_equal(sorted_sizes, wanted_sizes)
            assert_bitwise_equal(back[dtype][: sizes.sum()], leaf[: sizes.sum()], dtype)
            assert not np.asarray(back[dtype]).view(np.uint8)[sizes.sum() :].any()
    assert run._cache_size() == 1


@each_implementation("dispatch", num_ranks=1)
@pytest.mark.parametrize(
    "sizes",
    [[5, 4, 3], [0, 20, 1], [2**31 - 1] * 3, [-4, 3, 2], [0, 0, 0], [8, 0, 0], [7, 2**31 - 1, 1]],
    ids=str,
)
def test_sizes_that_exceed_the_rows(sizes, implementation):
    """C4: chunks end at row N = 8, nothing overflows, and the sizes returned show what moved.

    Their sum is below that of the sizes given exactly where rows are missing.
    """
    x, sizes = make_bits(8, 4, dtype=np.int32), np.array(sizes, np.int32)
    order = np.array([2, 0, 1], np.int32)
    rows, sorted_sizes = ep.sort_chunks(x, sizes, order, implementation=implementation)
    wanted, wanted_sizes, _ = sorted_by_loops(x, sizes, order)
    assert_bitwise_equal(rows, wanted)
    assert_bitwise_equal(sorted_sizes, wanted_sizes)
    demand = np.maximum(sizes, 0).astype(np.int64).sum()
    assert (int(sorted_sizes.sum()) < demand) == (demand > 8)


def test_int64_sizes_are_limited_before_they_are_narrowed():
    """2^32 rows are more than N = 4, though the low 32 bits are 0."""
    x, sizes, order = np.arange(16, dtype=np.int32), np.array([1, 2**32]), np.array([1, 0])
    with jax.enable_x64(True):
        rows, sizes = ep.sort_chunks(x.reshape(4, 4), sizes, order)
    assert rows[:, 0].tolist() == [4, 8, 12, 0]
    assert (sizes.tolist(), sizes.dtype) == ([3, 1], np.int32)


@each_implementation("combine", num_ranks=1)
def test_gradient_of_sort_chunks_is_the_inverse_move(implementation):
    """Each row gets the gradient of its new place; rows of the tail get +0, and NaN in the
    gradient of the tail reaches nobody."""
    x, dout = make_floats(24, 16), make_floats(24, 16, seed=1)

    @jax.jit
    def pull(x, sizes, order, dout):
        def move(x):
            return ep.sort_chunks(x, sizes, order, implementation=implementation)[0]

        return jax.vjp(move, x)[1](dout)[0]

    for seed in range(4):
        sizes, order = make_chunks(seed)
        places = sorted_by_loops(x, sizes, order)[2]
        wanted = np.zeros_like(x)
        wanted[places] = dout[: len(places)]
        garbage = np.where(np.arange(24)[:, None] < len(places), dout, np.nan)
        assert_bitwise_equal(pull(x, sizes, order, garbage.astype(np.float32)), wanted)


def test_an_order_that_is_none_stays_in_bounds():
    """Numbers named twice, too large or negative: every row is one of x, or zero, and no slot that
    a kernel would write lies outside of the N = 8 rows."""
    x, config = make_floats(8, 4), ep.EpConfig(1, ())
    candidates = {row.tobytes() for row in (*x, np.zeros(4, np.float32))}
    sizes = np.array([3, 2, 3], np.int32)
    for order in ([0, 0, 0], [2, 2, 0], [9, -1, 2], [2**31 - 1, -(2**31), 1]):
        order = np.array(order, np.int32)
        rows, _ = ep.sort_chunks(x, sizes, order, implementation="reference")
        assert {row.tobytes() for row in np.asarray(rows)} <= candidates
        plan = permutation._plan_of_chunks(jnp.asarray(sizes), jnp.asarray(order), 8, config)
        assert plan.slots.min() >= -1
        assert plan.slots.max() < 8


@each_implementation("dispatch", num_ranks=1)
def test_rank_major_becomes_expert_major(implementation):
    """What 2 ranks send to rank 1, chunk by chunk (rank, expert), sorts to the rows of dispatch."""
    case = Case(T=6, K=2, E=6, R=2, H=4)
    ids, x = make_ids("uniform", case), make_floats(2, case.T, case.H)
    plan, rank, num_local = run_plan(case, ids), 1, case.num_local
    received = [
        x[r, t]
        for r in range(case.R)
        for e in range(rank * num_local, (rank + 1) * num_local)
        for t, k in np.ndindex(case.T, case.K)
        if ids[r, t, k] == e
    ]
    rows = np.zeros((plan.capacity, case.H), np.float32)
    rows[: len(received)] = received
    order = jnp.arange(case.R * num_local).reshape(case.R, num_local).T.reshape(-1)
    sizes = plan.source_counts[rank].reshape(-1)
    expert_major, _ = ep.sort_chunks(rows, sizes, order, implementation=implementation)
    assert_bitwise_equal(expert_major, oracle.dispatch(case, x, plan.slots)[rank])
    assert not np.array_equal(rows, expert_major)


@pytest.mark.parametrize(
    ("x", "num_chunks", "text"),
    [
        (np.zeros((4, 4)), 0, "chunk_sizes and order must be [M] with M >= 1, got shapes (0,) and"),
        (np.zeros(()), 2, "every leaf of x must be [N, ...] with N = 0 as in the first leaf"),
        ([np.zeros((4, 4)), 1.0], 2, "with N = 4 as in the first leaf, got shape ()"),
    ],
    ids=["no chunks", "a scalar", "a scalar among rows"],
)
def test_errors(x, num_chunks, text):
    sizes = np.zeros(num_chunks, np.int32)
    with pytest.raises(ValueError, match=r"jax_moe_ep.sort_chunks: .*" + re.escape(text)):
        ep.sort_chunks(x, sizes, sizes)


def test_chunks_of_nothing():
    rows, sizes = ep.sort_chunks({}, np.array([1, 2]), np.array([1, 0]))
    assert (rows, sizes.tolist()) == ({}, [0, 0])
    rows, sizes = ep.sort_chunks(np.zeros((0, 4)), np.array([1, 2]), np.array([1, 0]))
    assert (rows.shape, sizes.tolist()) == ((0, 4), [0, 0])
