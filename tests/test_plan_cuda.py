"""The plan kernels on one GPU, as any rank of a group of any size, from the gathered ids."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import (
    CASES,
    MAKERS,
    ON_GPUS,
    Case,
    assert_bitwise_equal,
    make_ids,
    make_priority,
)

from jax_moe_ep import cuda

pytestmark = pytest.mark.skipif(not ON_GPUS, reason="needs a CUDA GPU")

LARGE = {
    "deepseek": Case(T=512, K=8, E=256, R=2, A=128),
    "most_experts": Case(T=300, K=8, E=4096, R=2, A=4, capacity=500),
    "one_rank_of_all": Case(T=2000, K=8, E=4096, R=1, A=16, empty_groups="block"),
    "many_ranks": Case(T=40, K=4, E=64, R=64, capacity=1.0),
    "priority": Case(T=512, K=8, E=256, R=4, A=8, capacity=700, drop_policy="priority"),
    "priority_experts": Case(
        T=200, K=8, E=4096, R=8, expert_capacity=0.7, drop_policy="priority", distinct_experts=False
    ),
    "tight": Case(T=1500, K=2, E=4, R=2, A=64, capacity=128),
    # At the limits of one block, and beyond them: deepseek is at one of them.
    "beyond_one_block": Case(T=513, K=8, E=256, R=2, A=128),
    "two_warps_a_rank": Case(T=64, K=8, E=256, R=16, A=8, capacity=1.0),
    "experts_of_one_block": Case(T=32, K=8, E=1024, R=8, A=16, empty_groups="block"),
    "beyond_its_experts": Case(T=33, K=8, E=1024, R=8, A=16),
}
ALL = {name: case for name, case in {**CASES, **LARGE}.items() if case.T}


@functools.cache
def plan_of_rank(case: Case, rank: int, force_large: str = "0"):
    """force_large: what the environment says when it is traced."""
    options = {"config": case.config("cuda"), "num_ranks": case.R, "rank": rank}
    return jax.jit(functools.partial(cuda.plan_from_gathered, **options))


def all_plans(case: Case, ids: np.ndarray, priority: np.ndarray | None, force_large: str):
    flat = ids.reshape(-1, case.K)
    if priority is None:
        priority = np.zeros((0, case.K), np.float32)
    plans = [
        plan_of_rank(case, rank, force_large)(flat, priority.reshape(-1, case.K))
        for rank in range(case.R)
    ]
    return {name: np.stack([getattr(p, name) for p in plans]) for name in oracle.LEAVES}


@pytest.mark.parametrize("force_large", ["0", "1"], ids=["by_size", "large"])
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", ALL)
def test_every_rank_equals_the_oracle(
    name: str, maker: str, force_large: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small cases by one block, and by the kernels of large ones."""
    monkeypatch.setenv(cuda.FORCE_LARGE, force_large)
    case = ALL[name]
    ids, priority = make_ids(maker, case), make_priority(case)
    expected = oracle.plan(case, ids, priority)
    for leaf, got in all_plans(case, ids, priority, force_large).items():
        assert_bitwise_equal(got, expected[leaf], leaf)


@pytest.mark.parametrize("num_sms", [1, 2])
def test_few_blocks_do_the_same(num_sms: int) -> None:
    case = LARGE["priority"]
    ids, priority = make_ids("skewed", case), make_priority(case)
    config = dataclasses.replace(case.config("cuda"), num_sms=num_sms)
    plan = cuda.plan_from_gathered(
        jnp.asarray(ids.reshape(-1, case.K)),
        jnp.asarray(priority.reshape(-1, case.K)),
        config=config,
        num_ranks=case.R,
        rank=1,
    )
    expected = oracle.plan(case, ids, priority)
    for leaf in oracle.LEAVES:
        assert_bitwise_equal(getattr(plan, leaf), expected[leaf][1], leaf)


def test_the_example_of_the_kernel() -> None:
    """The numbers in the comment of plan.cu, derived there."""
    case = Case(T=4, K=1, E=2, R=1, A=2)
    ids = jnp.array([[1], [0], [1], [-1]], jnp.int32)
    plan = plan_of_rank(case, 0)(ids, jnp.zeros((0, 1)))
    assert plan.group_counts.tolist() == [1, 2]
    assert plan.group_sizes.tolist() == [2, 2]
    assert plan.group_starts.tolist() == [0, 2]
    assert plan.slots.ravel().tolist() == [2, 0, 3, -1]
    assert plan.owners.ravel().tolist() == [0, 0, 0, -1]
