"""Any routing, any values: plan, dispatch and combine are those of the loops, bitwise.

The static side is drawn from CASES, which other tests have compiled already; ids, priorities,
weights are drawn freely, rows by a seed and a scale.
"""

import numpy as np
import oracle
from helpers import (
    CASES,
    MAKERS,
    assert_bitwise_equal,
    assert_plans_equal,
    each_case,
    make_floats,
    make_ids,
    run,
    run_plan,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jax_moe_ep as ep

# Products and sums of these stay normal float32 numbers, or zero.
VALUES = st.floats(-(2.0**20), 2.0**20, width=32).map(lambda x: 0.0 if abs(x) < 2.0**-20 else x)
SEEDS = st.integers(0, 2**16)


def routings(case):
    """Ids from one before the experts to two behind them, or one of the named routings."""
    shape = (case.R, case.T, case.K)
    free = hnp.arrays(np.int32, shape, elements=st.integers(-1, case.E + 1))
    named = st.builds(
        lambda maker, seed: make_ids(maker, case, seed),
        st.sampled_from(sorted(MAKERS)),
        SEEDS,
    )
    return free | named


def priorities(case):
    shape = (case.R, case.T, case.K)
    return hnp.arrays(np.float32, shape, elements=st.floats(width=32, allow_subnormal=False))


@each_case("plan")
@given(data=st.data())
def test_plan(name, implementation, data):
    case = CASES[name]
    ids = data.draw(routings(case))
    priority = data.draw(priorities(case)) if case.drop_policy == "priority" else None
    plan = run_plan(case, ids, priority, implementation)
    assert_plans_equal(plan, oracle.plan(case, ids, priority))
    assert (plan.group_sizes.sum(1) <= plan.capacity).all()
    assert (plan.num_assignments - plan.num_dropped == plan.group_counts.sum(1)).all()


@each_case("dispatch")
@given(data=st.data())
def test_dispatch(name, implementation, data):
    case = CASES[name]
    ids = data.draw(routings(case))
    priority = data.draw(priorities(case)) if case.drop_policy == "priority" else None
    plan = run_plan(case, ids, priority)
    x = make_floats(case.R, case.T, case.H, seed=data.draw(SEEDS))
    rows = run(ep.dispatch, plan, x, implementation=implementation)
    expected = oracle.dispatch(case, x, oracle.plan(case, ids, priority)["slots"])
    for rank, sizes in enumerate(plan.group_sizes):
        end = sizes.sum() if case.tail == "undefined" else None
        assert_bitwise_equal(rows[rank, :end], expected[rank, :end])


@each_case("combine")
@given(data=st.data())
def test_combine(name, implementation, data):
    case = CASES[name]
    ids = data.draw(routings(case))
    priority = data.draw(priorities(case)) if case.drop_policy == "priority" else None
    plan, expected = run_plan(case, ids, priority), oracle.plan(case, ids, priority)
    y = make_floats(case.R, plan.capacity, case.H, seed=data.draw(SEEDS))
    y *= np.float32(data.draw(VALUES))
    weights = data.draw(hnp.arrays(np.float32, ids.shape, elements=VALUES))
    out = run(ep.combine, plan, y, weights, implementation=implementation)
    sums = oracle.combine(case, y, expected["slots"], expected["owners"], weights)
    assert_bitwise_equal(out, sums)
