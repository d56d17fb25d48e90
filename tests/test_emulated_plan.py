"""The plan by one block itself, as any rank, against the loops; on the host: emulation.py."""

import ctypes

import numpy as np
import oracle
import pytest
from emulation import ruined
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


def small_plan(library, case, ids, rank):
    """One rank's arrays of the plan; None where one block is not enough."""
    limit = oracle.expert_limit(case) if case.expert_capacity is not None else 2**31 - 1
    is_block = case.empty_groups == "block"
    options = (case.A, oracle.capacity(case), limit, is_block)
    numbers = np.array([case.R, case.E, case.T * case.K, *options], np.int32)
    local = (case.num_local,)
    shapes = ((case.R * case.T, case.K), (case.T, case.K), local, local, local, (case.R, *local))
    results = [ruined(*shape, dtype=np.int32) for shape in (*shapes, (), (), ())]
    arrays = [np.ascontiguousarray(ids), np.array(rank, np.int32), *results]
    pointers = (ctypes.c_void_p * len(arrays))(*[array.ctypes.data for array in arrays])
    status = ctypes.CDLL(library).small_plan(numbers.ctypes.data_as(ctypes.c_void_p), pointers)
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
