"""How many rows a rank has: the worst case, an int, or a factor.

The worst case is checked by brute force: every vector of counts that G tokens can give the L
experts of one rank, built token by token, for every option.
"""

import dataclasses
import functools
import itertools
import math

import jax
import numpy as np
import oracle
import pytest
from helpers import (
    Case,
    assert_bitwise_equal,
    make_mesh,
    on_ranks,
)

import jax_moe_ep as ep


@functools.cache
def reachable_counts(num_tokens, top_k, num_local, distinct):
    """All count vectors that `num_tokens` tokens of K choices can give L experts.

    A choice may also go elsewhere or nowhere, so a token adds any selection of up to K experts.
    """
    choose = itertools.combinations if distinct else itertools.combinations_with_replacement
    one_token = set()
    for size in range(top_k + 1):
        for chosen in choose(range(num_local), size):
            one_token.add(tuple(chosen.count(e) for e in range(num_local)))
    counts = {(0,) * num_local}
    for _ in range(num_tokens):
        counts = {tuple(map(sum, zip(a, b, strict=True))) for a in counts for b in one_token}
    return counts


def most_rows(case):
    """The most aligned rows that any routing needs on one rank, within the case's limits.

    A factor f promises room for ceil(f*T*K) live rows of any shape, and no more.
    """
    live = math.inf
    if isinstance(case.capacity, float):
        live = math.ceil(case.capacity * case.T * case.K)
    most = 0
    for counts in reachable_counts(case.R * case.T, case.K, case.num_local, case.distinct_experts):
        kept = [min(n, oracle.expert_limit(case)) for n in counts]
        if sum(kept) <= live:
            most = max(most, sum(oracle.aligned(n, case) for n in kept))
    return most


def small_cases(**options):
    """Every T, K, L, A below a few, with R = 2: G = 2*T tokens reach the rank's L experts."""
    for T, K, L, A in itertools.product((0, 1, 2, 3), (1, 2, 3), (1, 2, 3), (1, 2, 3, 4, 8)):
        yield Case(T=T, K=K, E=2 * L, R=2, A=A, **options)


def formula(case):
    return case.config().num_rows(case.R, case.T, case.K)


OPTIONS = [
    {"distinct_experts": distinct, "expert_capacity": per_expert, "capacity": factor}
    for distinct in (True, False)
    for per_expert in (None, 1, 2, 3, 0.5, 1.25)
    for factor in (None, 0.5, 1.0, 1.25, 4.0)
]


def name_options(options):
    return "-".join(f"{value}" for value in options.values())


@pytest.mark.parametrize("options", OPTIONS, ids=name_options)
def test_the_worst_case_is_never_exceeded_and_always_reached(options):
    for case in small_cases(**options):
        assert formula(case) == most_rows(case) == oracle.capacity(case), case


@pytest.mark.parametrize("options", OPTIONS, ids=name_options)
def test_the_worst_case_with_blocks_is_never_exceeded(options):
    """It is an upper bound, not always reached.

    The formula puts all N live rows into one expert: A for each of the L blocks, and
    (N-1) // A further blocks. An expert that fills up before N rows are spent passes the rest to
    the next one, whose block is there already, so that every further expert wastes one row. At
    most L-1 rows are wasted so, and C is at most up(L-1, A) above what can be needed.
    """
    for case in small_cases(**options, empty_groups="block"):
        gap = formula(case) - most_rows(case)
        assert formula(case) == oracle.capacity(case), case
        assert 0 <= gap <= math.ceil((case.num_local - 1) / case.A) * case.A, case
        if case.num_local == 1:
            assert gap == 0, case


def test_the_gap_with_blocks_by_hand():
    """G = 3 tokens (R = 1), K = 2, L = 2, A = 2: N = 6 live rows at most, 3 an expert.

    The formula gives min(2 * up(3, 2), 2 * 2 + down(5, 2)) = 8, and 3 + 3 rows need 4 + 4: it is
    reached. With capacity = 5/6, N = 5: min(8, 4 + 4) = 8, but the worst of 5 rows is 3 + 2,
    which needs 4 + 2 = 6.
    """
    case = Case(T=3, K=2, E=2, R=1, A=2, empty_groups="block")
    assert formula(case) == most_rows(case) == 8
    case = dataclasses.replace(case, capacity=5 / 6)
    assert (formula(case), most_rows(case)) == (8, 6)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        # N = 8 * min(2, 4) = 16 rows, 8 an expert; min(4 * 8, 16 + 3 * 4 = 28).
        (Case(T=4, K=2, E=8, R=2, A=4), 28),
        # One local expert: 8 tokens at most, aligned.
        (Case(T=4, K=2, E=2, R=2, A=16), 16),
        # Duplicates: N = 8 * 3 = 24 rows, all in one expert perhaps; min(2 * 24, down(24 + 6, 4)).
        (Case(T=4, K=3, E=4, R=2, A=4, distinct_experts=False), 28),
        # 3 rows an expert: 4 * 3 = 12 rows; min(4 * 4, down(12 + 12, 4)).
        (Case(T=4, K=2, E=8, R=2, A=4, expert_capacity=3), 16),
        # ceil(1.25 * 4 * 2) = 10 live rows; min(32, down(10 + 12, 4)).
        (Case(T=4, K=2, E=8, R=2, A=4, capacity=1.25), 20),
        # The factor never asks for more than the worst case.
        (Case(T=4, K=2, E=8, R=2, A=4, capacity=100.0), 28),
        # Blocks: min(4 * 8, 4 * 4 + down(15, 4)).
        (Case(T=4, K=2, E=8, R=2, A=4, empty_groups="block"), 28),
        # Nobody there: one block for each local expert, or nothing.
        (Case(T=0, K=2, E=8, R=2, A=4, empty_groups="block"), 16),
        (Case(T=0, K=2, E=8, R=2, A=4), 0),
        # An int is C as it stands, aligned or not.
        (Case(T=4, K=2, E=8, R=2, A=4, capacity=7), 7),
        # The batch of the benchmarks: min(128 * 8192, down(65536 + 127 * 128, 128)) = 81792.
        (Case(T=4096, K=8, E=256, R=2, A=128), 81792),
    ],
)
def test_capacity_by_hand(case, expected):
    assert formula(case) == expected == oracle.capacity(case)


@pytest.mark.parametrize(
    "case",
    [
        Case(T=2, K=2, E=4, R=1, A=3),
        Case(T=1, K=2, E=4, R=2, A=2),
        Case(T=2, K=2, E=3, R=1, A=2, distinct_experts=False),
        Case(T=2, K=2, E=3, R=1, A=2, empty_groups="block"),
    ],
)
def test_all_routings_of_a_tiny_group(case):
    """Each of the (E+1)^(R*T*K) routings, -1 among the choices, in one program.

    No assignment is dropped and no rank needs more than C rows; the worst needs all of them.
    """
    choices = list(itertools.product(range(-1, case.E), repeat=case.K))
    if case.distinct_experts:
        choices = [c for c in choices if all(c.count(e) < 2 for e in c if e >= 0)]
    routings = list(itertools.product(choices, repeat=case.R * case.T))
    ids = np.array(routings, np.int32).reshape(-1, case.R, case.T, case.K)

    def all_plans(ids):
        def measure(ids):
            plan = ep.plan(ids, case.config())
            return plan.group_sizes.sum(), plan.num_dropped, plan.required_rows

        return jax.lax.map(measure, ids)

    run_all = on_ranks(all_plans, make_mesh(case.R))
    rows, dropped, required = jax.device_get(run_all(np.moveaxis(ids, 1, 0)))
    assert not dropped.any()
    assert_bitwise_equal(rows, required)
    assert rows.max() == formula(case)
