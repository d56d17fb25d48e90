"""permute and unpermute against loops, and the errors of permutations by their text."""

import re

import jax
import numpy as np
import oracle
import pytest
from helpers import (
    MAKERS,
    Case,
    assert_bitwise_equal,
    assert_plans_equal,
    each_implementation,
    make_bits,
    make_floats,
    make_ids,
    run_plan,
)

import jax_moe_ep as ep

CASE = Case(T=12, K=3, E=6, R=1, A=4, distinct_experts=False)


@each_implementation("dispatch", num_ranks=1)
def test_permute_and_unpermute_are_those_of_the_loops(implementation):
    """A2, A8, C2: any number of routings compiles once; duplicates have a row each, -1 none.

    Rows of -1 tokens cost nothing: no row, and a result of +0.
    """

    def there_and_back(x, ids, weights):
        rows, plan = ep.permute(
            x, ids, CASE.E, alignment=CASE.A, capacity=None, implementation=implementation
        )
        return rows, plan, ep.unpermute(rows, plan, weights)

    run = jax.jit(there_and_back)
    x, weights = make_floats(CASE.T, CASE.H), make_floats(CASE.T, CASE.K)
    for maker in MAKERS:
        ids = make_ids(maker, CASE)
        rows, plan, out = jax.device_get(run(x, ids[0], weights))
        expected = oracle.plan(CASE, ids)
        assert_plans_equal(jax.tree.map(lambda leaf: leaf[None], plan), expected)
        wanted = oracle.dispatch(CASE, x[None], expected["slots"])
        assert_bitwise_equal(rows, wanted[0], maker)
        assert not plan.num_dropped, maker
        back = oracle.combine(CASE, wanted, expected["slots"], expected["owners"], weights[None])
        assert_bitwise_equal(out, back[0], maker)
    assert run._cache_size() == 1


@each_implementation("dispatch", num_ranks=1)
def test_permute_indices_of_static_size_with_a_sentinel_tail(implementation):
    """C1: sources t*K + k of all C rows, -1 in padding and tail; gathering by them is permute."""
    ids, x = make_ids("masked", CASE)[0], make_bits(CASE.T, CASE.H, dtype=np.float32)
    rows, plan = jax.jit(
        lambda x, ids: ep.permute(x, ids, CASE.E, alignment=CASE.A, implementation=implementation)
    )(x, ids)
    sources = np.asarray(ep.row_sources(plan))
    assert sources.shape == (oracle.capacity(CASE),)
    assert (sources[int(plan.group_sizes.sum()) :] == -1).all()
    named = np.flatnonzero((ids >= 0) & (ids < CASE.E))
    assert np.sort(sources[sources >= 0]).tolist() == named.tolist()
    gathered = np.where(sources[:, None] >= 0, x.view(np.uint32)[sources // CASE.K], 0)
    assert_bitwise_equal(np.asarray(rows).view(np.uint32), gathered.astype(np.uint32))


@each_implementation("dispatch", num_ranks=1)
def test_duplicates_fit_without_a_capacity(implementation):
    """A2: 4 tokens name expert 1 three times each: 12 rows, though 2 experts hold 8 of different
    ones; the sum of a token's rows is 3x."""
    x, ids = make_floats(4, 4), np.ones((4, 3), np.int32)
    rows, plan = ep.permute(x, ids, 2, implementation=implementation)
    assert_bitwise_equal(rows, x.repeat(3, axis=0))
    assert (plan.num_dropped, plan.group_counts.tolist()) == (0, [0, 12])
    assert_bitwise_equal(ep.unpermute(rows, plan), x + x + x)


def test_options_of_permute():
    """Each has the effect of the option of EpConfig that it is."""
    x, ids = make_floats(4, 4), np.zeros((4, 2), np.int32)
    undefined = {"tail": "undefined", "implementation": "reference"}
    rows, plan = ep.permute(x, ids, 2, capacity=6, alignment=2, **undefined)
    assert (rows.shape, plan.num_dropped, plan.group_sizes.tolist()) == ((6, 4), 2, [6, 0])
    assert plan.config == ep.EpConfig(
        2, (), alignment=2, capacity=6, distinct_experts=False, **undefined
    )
    rows, plan = ep.permute(x, np.array([[1, -1]] * 4), 2, **undefined)
    assert np.isnan(rows[4:]).all()
    with pytest.raises(NotImplementedError, match="implementation='cuda' needs CUDA devices"):
        jax.jit(lambda x: ep.permute(x, ids, 2, implementation="cuda")[0]).trace(x).lower(
            lowering_platforms=("cpu",)
        )


# Errors.

X, IDS, SIZES = np.zeros((4, 4), np.float32), np.zeros((4, 2), np.int32), np.array([1, 3])
ERRORS = {
    "ids of another dtype": (
        lambda: ep.permute(X, IDS == 0, 2),
        "jax_moe_ep.permute: topk_idx must be int32 or int64, got bool. dense_to_topk makes ids",
    ),
    "another number of tokens": (
        lambda: ep.permute([X, X[:3]], IDS, 2),
        "jax_moe_ep.permute: every leaf of x must be [T, ...] with T = 4 as in topk_idx, got shape "
        "(3, 4)",
    ),
    "an option": (lambda: ep.permute(X, IDS, 2, tail="nan"), "tail must be one of 'zero', 'undef"),
    "plan of a group": (
        lambda: ep.unpermute(X, run_plan(Case(T=4, K=2, E=4, R=2), np.stack([IDS] * 2))),
        "jax_moe_ep.unpermute: the plan must be that of permute, whose group is one rank without a "
        "mesh axis, got the plan of axis 'expert'. Use combine",
    ),
    "sizes of another dtype": (
        lambda: ep.sort_chunks(X, SIZES * 1.0, SIZES),
        "jax_moe_ep.sort_chunks: chunk_sizes must be int32 or int64, got float32",
    ),
    "order of another dtype": (
        lambda: ep.sort_chunks(X, SIZES, SIZES == 0),
        "jax_moe_ep.sort_chunks: order must be int32 or int64, got bool",
    ),
    "order of another shape": (
        lambda: ep.sort_chunks(X, SIZES, SIZES[:1]),
        "sort_chunks: chunk_sizes and order must be [M] with M >= 1, got shapes (2,) and (1,)",
    ),
    "sizes by rank": (
        lambda: ep.sort_chunks(X, SIZES[None], SIZES[None]),
        "got shapes (1, 2) and (1, 2). Flatten sizes [R, L] with reshape(-1)",
    ),
    "leaves that disagree": (
        lambda: ep.sort_chunks([X, X[:2]], SIZES, SIZES),
        "jax_moe_ep.sort_chunks: every leaf of x must be [N, ...] with N = 4 as in the first leaf, "
        "got shape (2, 4)",
    ),
    "rows of another number, to unpermute": (
        lambda: ep.unpermute(X[:1], ep.permute(X, IDS, 2)[1]),
        "jax_moe_ep.unpermute: rows must be [C, ...] with C = ",
    ),
    "integer rows": (
        lambda: ep.unpermute(*ep.permute(X.astype(np.int32), IDS, 2)),
        "jax_moe_ep.unpermute: rows must be floating with at most 32 bits, got int32",
    ),
    "an axis that is not there": (
        lambda: ep.plan(IDS, ep.EpConfig(2, "expert")),
        "jax_moe_ep.plan: axis 'expert' is not bound here",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_argument_and_remedy(name):
    call, text = ERRORS[name]
    with pytest.raises((TypeError, ValueError), match=re.escape(text)):
        call()
