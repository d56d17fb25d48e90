"""The plan by one block itself, as any rank, against the loops; on the host: emulation.py."""

import ctypes
import math

import numpy as np
import oracle
import pytest
from emulation import OPS, Way, repeat, ruined, run_to_the_end
from helpers import CASES, MAKERS, Case, assert_bitwise_equal, make_ids, one_process
from native_build import needs_compiler

pytestmark = [needs_compiler, one_process]

PLANS = {
    **{name: case for name, case in CASES.items() if case.drop_policy == "position" and case.T},
    "three_ranks": Case(T=9, K=2, E=12, R=3, capacity=16),
    "no_row_fits": Case(T=8, K=2, E=4, R=2, A=64, capacity=60),
    "several_rounds_a_warp": Case(T=512, K=8, E=256, R=2, A=16, capacity=1.0),
    "all_experts": Case(T=250, K=4, E=1024, R=1, A=4),
}


def numbers_of(case):
    """As kernels.cc wants them."""
    limit = oracle.expert_limit(case) if case.expert_capacity is not None else 2**31 - 1
    options = (case.A, oracle.capacity(case), limit, case.empty_groups == "block")
    return np.array([case.R, case.E, case.T * case.K, *options], np.int32)


def shapes_of(case):
    local = (case.num_local,)
    shapes = ((case.R * case.T, case.K), (case.T, case.K), local, local, local, (case.R, *local))
    return (*shapes, (), (), ())


def small_plan(library, case, ids, rank):
    """One rank's arrays of the plan; None where one block is not enough."""
    numbers = numbers_of(case)
    results = [ruined(*shape, dtype=np.int32) for shape in shapes_of(case)]
    arrays = [np.ascontiguousarray(ids), *results]
    pointers = (ctypes.c_void_p * len(arrays))(*[array.ctypes.data for array in arrays])
    status = ctypes.CDLL(library).small_plan(
        numbers.ctypes.data_as(ctypes.c_void_p), rank, pointers
    )
    return dict(zip(oracle.LEAVES, results, strict=True)) if status == 0 else None


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", PLANS)
def test_small_plan(library, name, maker):
    """Every array of every rank, against the loops."""
    case = PLANS[name]
    ids = make_ids(maker, case)
    expected = oracle.plan(case, ids)
    for rank in range(case.R):
        for leaf, got in small_plan(library, case, ids, rank).items():
            assert_bitwise_equal(got, expected[leaf][rank], leaf)


@pytest.mark.parametrize(
    "case",
    [
        Case(T=16, K=2, E=8, R=2, A=4),
        Case(T=9, K=2, E=12, R=3, capacity=16),
        Case(T=65, K=8, E=64, R=2, A=16),
        Case(T=3, K=3, E=4, R=2, empty_groups="block"),  # 36 bytes of ids
    ],
    ids=lambda case: f"T{case.T}_R{case.R}",
)
def test_small_plan_of_a_group(library, tmp_path, case):
    """Exchange and plan in one call, whoever is late; five calls pass both parities."""
    job, arrays, sizes = job_of_plan(case)
    for call in repeat(library, tmp_path, job, Way(repeats=5, late=case.R - 1), **arrays):
        expected = oracle.plan(case, call["x"])
        for rank in range(case.R):
            parts = np.split(call["results"][rank], np.cumsum(sizes)[:-1])
            for leaf, part, shape in zip(oracle.LEAVES, parts, shapes_of(case), strict=True):
                assert_bitwise_equal(part.reshape(shape), expected[leaf][rank], leaf)


def job_of_plan(case):
    """With its arrays, and the sizes of the plan's."""
    sizes = [math.prod(shape) for shape in shapes_of(case)]
    job = {
        **dict.fromkeys(("type", "num_groups", "alignment", "capacity", "zero_tail"), 0),
        **dict.fromkeys(("has_weights", "has_bulk_copy"), 0),
        "op": OPS["plan"],
        "num_ranks": case.R,
        "num_tokens": case.T,
        "top_k": case.K,
        "row_bytes": 4 * case.K,
    }
    arrays = {
        "x": make_ids("uniform", case).reshape(case.R, case.T, case.K),
        "out": ruined(case.R, case.R * case.T, case.K, dtype=np.int32),
        "numbers": np.stack([numbers_of(case)] * case.R),
        "results": ruined(case.R, sum(sizes), dtype=np.int32),
    }
    return job, arrays, sizes


def test_nobody_has_rows_when_a_rank_is_in_another_call(library, tmp_path):
    case = Case(T=16, K=2, E=8, R=4, A=4)
    job, arrays, sizes = job_of_plan(case)
    after, failures = run_to_the_end(library, tmp_path, job, Way(odd=2), **arrays)
    assert (failures[:, 0] != 0).all()
    expected = oracle.plan(case, np.full_like(arrays["x"], -1))
    assert (expected["slots"] == -1).all()
    for rank in range(case.R):
        parts = np.split(after["results"][rank].reshape(-1), np.cumsum(sizes)[:-1])
        for leaf, part, shape in zip(oracle.LEAVES, parts, shapes_of(case), strict=True):
            assert_bitwise_equal(part.reshape(shape), expected[leaf][rank], leaf)


@pytest.mark.parametrize(
    ("case", "is_small"),
    [
        (Case(T=512, K=8, E=256, R=2), True),  # 16 warps of 8 * 32 a rank
        (Case(T=513, K=8, E=256, R=2), False),
        (Case(T=64, K=8, E=256, R=16), True),  # 2 warps a rank
        (Case(T=64, K=8, E=1024, R=8), False),  # 8 warps have counters: 1 a rank
        (Case(T=32, K=8, E=1024, R=8), True),
        (Case(T=1, K=1, E=1024, R=16), False),
        (Case(T=1, K=1, E=2048, R=2), False),
    ],
)
def test_which_plans_are_small(library, case, is_small):
    ids = make_ids("uniform", case)
    assert (small_plan(library, case, ids, 0) is not None) == is_small
