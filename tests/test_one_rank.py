"""A group of one rank: every op against the loops, in sizes that the kernels split up."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from helpers import (
    DEVICES,
    ON_GPUS,
    Case,
    assert_bitwise_equal,
    assert_plans_equal,
    each_implementation,
    make_bits,
    make_floats,
    make_ids,
    make_mesh,
    make_priority,
    on_ranks,
    run,
    run_plan,
)

import jax_moe_ep as ep

needs_gpu = pytest.mark.skipif(not ON_GPUS, reason="needs a CUDA GPU")

SHAPES = {
    "plain": Case(T=37, K=8, E=16, R=1, A=8, H=64),
    "k_3": Case(T=5, K=3, E=4, R=1, H=16),
    "k_64": Case(T=33, K=64, E=96, R=1, A=16, H=48),
    "k_beyond_e": Case(T=30, K=40, E=7, R=1, A=2, H=32, distinct_experts=False),
    "two_tiles": Case(T=50, K=2, E=8, R=1, A=4, H=7168, capacity=60, tail="undefined"),
    "large_blocks": Case(T=9, K=2, E=12, R=1, A=128, H=16, empty_groups="block"),
    "row_beyond_shared_memory": Case(T=3, K=2, E=2, R=1, A=2, H=65552),
    "priority": Case(T=21, K=2, E=8, R=1, A=4, H=32, capacity=24, drop_policy="priority"),
}
DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
each_shape = pytest.mark.parametrize("name", SHAPES)
each_maker = pytest.mark.parametrize("maker", ["uniform", "one_expert", "masked", "random"])


@functools.cache
def planned(name, maker):
    """The case and the plan of the loops: as a Plan, and as its arrays."""
    case = SHAPES[name]
    expected = oracle.plan(case, make_ids(maker, case), make_priority(case))
    capacity = oracle.capacity(case)
    static = {"num_ranks": 1, "num_tokens": case.T, "capacity": capacity}
    return case, ep.Plan(**expected, config=case.config(), **static), expected


@each_implementation("plan", num_ranks=1)
@each_maker
@each_shape
def test_plan(name, maker, implementation):
    case, plan, expected = planned(name, maker)
    got = run_plan(case, make_ids(maker, case), make_priority(case), implementation)
    assert_plans_equal(got, expected)
    assert got.capacity == plan.capacity


def defined_rows(case, expected):
    """The rows that are not an undefined tail."""
    return slice(None if case.tail == "zero" else int(expected["group_sizes"].sum()))


def with_garbage(case, expected, y, weights):
    """NaN wherever an op must not look."""
    y[oracle.row_sources(case, expected["slots"]) < 0] = np.nan
    weights[expected["owners"] < 0] = np.nan
    return y, weights


@each_implementation("dispatch", num_ranks=1)
@each_maker
@each_shape
def test_dispatch(name, maker, implementation):
    """A5: any bits of 1 to 4 bytes arrive, in one call; padding and a zero tail are zero."""
    case, plan, expected = planned(name, maker)
    x = [make_bits(1, case.T, case.H, dtype=dtype) for dtype in (*DTYPES, np.uint8)]
    rows = run(ep.dispatch, plan, x, implementation=implementation)
    defined = defined_rows(case, expected)
    for leaf, moved in zip(x, rows, strict=True):
        want = oracle.dispatch(case, leaf, expected["slots"])
        assert_bitwise_equal(moved[:, defined], want[:, defined], str(leaf.dtype))


@each_implementation("combine", num_ranks=1)
@pytest.mark.parametrize("dtype", DTYPES)
@each_maker
@each_shape
def test_combine(name, maker, dtype, implementation):
    case, plan, expected = planned(name, maker)
    slots, owners = expected["slots"], expected["owners"]
    y, weights = with_garbage(
        case,
        expected,
        make_floats(1, plan.capacity, case.H, dtype=dtype),
        make_floats(1, case.T, case.K),
    )
    out = run(ep.combine, plan, y, weights, implementation=implementation)
    assert_bitwise_equal(out, oracle.combine(case, y, slots, owners, weights), "weighted")
    out = run(ep.combine, plan, y, implementation=implementation)
    assert_bitwise_equal(out, oracle.combine(case, y, slots, owners), "unweighted")


def combine_gradients(y, plan, weights, dout):
    return jax.vjp(lambda y, w: ep.combine(y, plan, w), y, weights)[1](dout)


@each_implementation("combine_backward", num_ranks=1)
@pytest.mark.parametrize("dtype", DTYPES)
@each_maker
@each_shape
def test_combine_backward(name, maker, dtype, implementation):
    """dy exactly. dw is a sum of H fp32 products in another order than the float64 of the loops:
    within 2^-24 of the sum of magnitudes for each of at most log2(H) + H / 256 additions."""
    case, plan, expected = planned(name, maker)
    y, weights = with_garbage(
        case,
        expected,
        make_floats(1, plan.capacity, case.H, dtype=dtype),
        make_floats(1, case.T, case.K, seed=1),
    )
    dout = make_floats(1, case.T, case.H, dtype=dtype, seed=2)
    dy, dw = run(combine_gradients, plan, y, weights, dout, implementation=implementation)
    want_dy, want_dw = oracle.combine_backward(case, dout, y, expected["slots"], weights)
    want_dy[oracle.row_sources(case, expected["slots"]) < 0] = 0
    defined = defined_rows(case, expected)
    assert_bitwise_equal(dy[:, defined], want_dy[:, defined], "dy")
    magnitude = np.abs(dout[0].astype(np.float64)).sum(1).max() * 6  # |y| < 6
    steps = np.log2(case.H) + case.H / 256
    assert np.abs(dw - want_dw).max() <= 2.0**-24 * steps * magnitude
    assert (dw[expected["owners"] < 0] == 0).all()


@each_implementation("row_weights", num_ranks=1)
@pytest.mark.parametrize("dtype", DTYPES)
@each_shape
def test_row_weights_and_gradient(name, dtype, implementation):
    """Each row's number goes there and back; what has no row gets 0."""
    case, plan, expected = planned(name, "masked")
    weights = make_floats(1, case.T, case.K, dtype=dtype)
    drow = make_floats(1, plan.capacity, dtype=dtype)
    rows, dw = run(
        lambda w, plan, drow: (
            ep.row_weights(w, plan),
            jax.vjp(lambda w: ep.row_weights(w, plan), w)[1](drow)[0],
        ),
        plan,
        weights,
        drow,
        implementation=implementation,
    )
    assert_bitwise_equal(rows, oracle.row_weights(case, weights, expected["slots"]))
    slots = expected["slots"]
    want = np.where(slots >= 0, drow[0][slots], np.zeros((), dtype))
    assert_bitwise_equal(dw, want.reshape(1, case.T, case.K))


def test_the_examples_of_the_kernels() -> None:
    """The numbers in the comments of dispatch.cu, combine.cu and row_weights.cu, four times each
    where a row must have 16 bytes."""
    implementation = "cuda" if ON_GPUS else "reference"
    case = Case(T=2, K=2, E=2, R=1, A=2, H=4, capacity=4)
    plan = run_plan(case, np.array([[[1, 0], [-1, 1]]], np.int32), None, implementation)
    assert plan.slots.tolist() == [[[2, 0], [-1, 3]]]
    assert plan.group_counts.tolist() == [[1, 2]]
    a, b = 5.0, 7.0
    x = np.array([[[a] * 4, [b] * 4]], np.float32)
    rows = run(ep.dispatch, plan, x, implementation=implementation)
    assert rows[0, :, 0].tolist() == [a, 0, a, b]
    y = np.repeat(np.array([[4, 0, 1, 0]], np.float32)[..., None], 4, axis=2)
    weights = np.array([[[2, 0.5], [0, 1]]], np.float32)
    out = run(ep.combine, plan, y, weights, implementation=implementation)
    assert out[0, 0].tolist() == [4.0] * 4
    weights = np.array([[[1, 2], [3, 4]]], np.float32)
    row_weights = run(ep.row_weights, plan, weights, implementation=implementation)
    assert row_weights.tolist() == [[2, 0, 1, 4]]

    case = Case(T=1, K=2, E=2, R=1, H=4)
    plan = run_plan(case, np.array([[[1, -1]]], np.int32), None, implementation)
    y = np.zeros((1, plan.capacity, 4), np.float32)
    y[0, 0, :2] = 4, 5
    weights = np.array([[[3, np.nan]]], np.float32)
    dout = np.array([[[1, 2, 0, 0]]], np.float32)
    dy, dw = run(combine_gradients, plan, y, weights, dout, implementation=implementation)
    assert dy[0, 0].tolist() == [3, 6, 0, 0]
    assert dw.tolist() == [[[14, 0]]]


@needs_gpu
@pytest.mark.parametrize("num_sms", [1, 2])
def test_few_sms_do_the_same(num_sms):
    case, plan, expected = planned("plain", "uniform")
    config = dataclasses.replace(case.config("cuda"), num_sms=num_sms)
    plan = dataclasses.replace(plan, config=config)
    x = make_floats(1, case.T, case.H)
    rows = jax.device_get(on_ranks(ep.dispatch, make_mesh(1))(x, plan))
    assert_bitwise_equal(rows, oracle.dispatch(case, x, expected["slots"]))
    out = jax.device_get(on_ranks(ep.combine, make_mesh(1))(rows, plan))
    want = oracle.combine(case, rows, expected["slots"], expected["owners"])
    assert_bitwise_equal(out, want)


@needs_gpu
def test_more_than_2_31_elements():
    """C6: 2^31 + 2^20 bf16 values in rows; the last row is right, and sums up again."""
    num_tokens, hidden = (2**31 + 2**20) // 8192 // 4, 8192
    config = ep.EpConfig(8, "expert", implementation="cuda")

    def step(ids, x):
        plan = ep.plan(ids, config)
        rows = ep.dispatch(x, plan)
        out = ep.combine(rows, plan)
        last = plan.group_counts.sum() - 1
        source = ep.row_sources(plan)[last]
        same = (rows[last] == x[source // 4]).all() & (rows[-1] == rows[last]).all()
        return same, (out == 4 * x).all(), plan.num_dropped, jnp.int32(rows.size // 2**20)

    random = np.random.default_rng(0)
    ids = np.argsort(random.random((num_tokens, 8)), axis=1)[:, :4].astype(np.int32)
    x = jnp.asarray(random.integers(-8, 8, (num_tokens, 1)), jnp.bfloat16) + jnp.zeros(
        (1, hidden), jnp.bfloat16
    )
    same, sums, dropped, size = on_ranks(step, make_mesh(1))(ids[None], x[None])
    assert size[0] > 2**11
    assert bool(same[0])
    assert bool(sums[0])
    assert int(dropped[0]) == 0


@needs_gpu
def test_captured_and_replayed_with_other_routings():
    """C3, C5: 1,000 steps of changing routing, few of them launched by the host, all right.

    Weights are 1 and x small integers, so a step of two layers gives (K * x) * K exactly.
    """
    from jax_moe_ep import _ffi

    case = Case(T=64, K=4, E=32, R=1, A=8, H=64)
    config = case.config("cuda")
    num_steps, num_routings = 1000, 8

    def step(ids, x, wrong):
        for _ in range(2):
            plan = ep.plan(ids, config)
            x = ep.combine(ep.dispatch(x, plan), plan)
        return wrong + (x != case.K**2 * x0).any() + (plan.num_dropped > 0)

    x0 = np.arange(case.T * case.H, dtype=np.float32).reshape(case.T, case.H) % 7
    routings = [jax.device_put(make_ids("uniform", case, seed)[0], DEVICES[0]) for seed in range(8)]
    mesh = make_mesh(1)
    spec = jax.sharding.PartitionSpec()
    compiled = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )
    x, wrong = jax.device_put((x0, np.int32(0)), DEVICES[0])
    wrong = compiled(routings[0], x, wrong)
    before = _ffi.num_executions()
    with jax.transfer_guard("disallow"):
        for i in range(num_steps):
            wrong = compiled(routings[i % num_routings], x, wrong)
        wrong.block_until_ready()
    calls = 6 * num_steps
    assert int(wrong) == 0
    assert _ffi.num_executions() - before < calls / 4


@needs_gpu
def test_two_layers_in_one_jit_and_donation():
    """A10: the second layer's routing does not disturb the first one's rows."""
    case = Case(T=32, K=2, E=8, R=1, A=4, H=32)
    config = case.config("cuda")

    @functools.partial(jax.jit, donate_argnums=0)
    def two(x, first, second):
        def body(x, first, second):
            plans = [ep.plan(ids, config) for ids in (first, second)]
            rows = [ep.dispatch(x, plan) for plan in plans]
            return [ep.combine(r, plan) for r, plan in zip(rows, plans, strict=True)]

        spec = jax.sharding.PartitionSpec()
        mesh = make_mesh(1)
        return jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(
            x, first, second
        )

    x = make_floats(case.T, case.H)
    ids = [make_ids(maker, case)[0] for maker in ("uniform", "masked")]
    first, second = two(jnp.asarray(x), *ids)
    assert_bitwise_equal(first, x + x)
    count = ((ids[1] >= 0) & (ids[1] < case.E)).sum(1, keepdims=True)
    assert_bitwise_equal(second, np.where(count == 0, 0, count * x).astype(np.float32) + 0)
