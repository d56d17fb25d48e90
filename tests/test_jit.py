"""Inside jit: one program for all routings, scan, donation, no transfers, names for checkpoint."""

import contextlib
import dataclasses
import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import (
    AXIS,
    MAKERS,
    Case,
    assert_bitwise_equal,
    make_floats,
    make_ids,
    make_mesh,
    on_ranks,
    run_plan,
)
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_moe_ep as ep
from jax_moe_ep import cuda

needs_extension = pytest.mark.skipif(not cuda.has_extension(), reason="needs the CUDA extension")

CASE = Case(T=4, K=2, E=8, R=2, A=2, H=8)


def layer_of(config):
    def layer(x, ids, weights):
        plan = ep.plan(ids, config)
        return ep.combine(ep.dispatch(x, plan), plan, weights)

    return layer


def make_inputs(case=CASE, maker="uniform", seed=0):
    weights = make_floats(case.R, case.T, case.K, seed=seed + 1)
    return make_floats(case.R, case.T, case.H, seed=seed), make_ids(maker, case, seed), weights


def expected_of(case, x, ids, weights):
    plan = oracle.plan(case, ids)
    rows = oracle.dispatch(case, x, plan["slots"])
    return oracle.combine(case, rows, plan["slots"], plan["owners"], weights)


def place(*arrays):
    """The arrays on their ranks, as a training loop would hold them."""
    return jax.device_put(arrays, NamedSharding(make_mesh(CASE.R), P(AXIS)))


def test_one_trace_for_all_routings():
    """Routing is a matter of values: the function is traced and compiled once."""
    traces = []
    layer = layer_of(CASE.config("auto"))

    def counted(*args):
        traces.append(args)
        return layer(*args)

    run = on_ranks(counted, make_mesh(CASE.R))
    for seed, maker in enumerate(MAKERS):
        inputs = make_inputs(maker=maker, seed=seed)
        assert_bitwise_equal(run(*inputs), expected_of(CASE, *inputs))
    assert len(traces) == 1
    assert run._cache_size() == 1


@pytest.mark.parametrize(
    ("implementation", "platform"),
    [
        ("reference", "cpu"),
        ("reference", "cuda"),
        pytest.param("cuda", "cuda", marks=needs_extension),
    ],
)
def test_the_program_does_not_grow_with_the_ranks(implementation, platform):
    """C2: as many instructions for 8 ranks as for 2, forward and backward.

    Each platform has its own instructions, so both are compiled for the same one, with any devices.
    """

    def size(num_ranks):
        case = Case(T=7, K=3, E=48, R=num_ranks, H=20)  # no two sizes alike: no shared functions
        layer = layer_of(case.config(implementation))

        def step(x, ids, weights):
            return jax.grad(lambda x, w: jnp.sum(layer(x, ids, w) ** 2), (0, 1))(x, weights)

        mesh = AbstractMesh((num_ranks,), (AXIS,), axis_types=(AxisType.Auto,))
        traced = on_ranks(step, mesh).trace(*make_inputs(case))
        return traced.lower(lowering_platforms=(platform,)).as_text().count(" = ")

    assert size(2) == size(8)


def test_scan_over_batches():
    """One plan per step, in a compiled loop."""
    layer = layer_of(CASE.config())
    batches = [make_inputs(maker=maker, seed=i) for i, maker in enumerate(("uniform", "masked"))]
    stacked = [np.stack(each, 1) for each in zip(*batches, strict=True)]

    def scanned(x, ids, weights):
        return jax.lax.scan(lambda _, each: (None, layer(*each)), None, (x, ids, weights))[1]

    out = on_ranks(scanned, make_mesh(CASE.R))(*stacked)
    for i, inputs in enumerate(batches):
        assert_bitwise_equal(np.asarray(out)[:, i], expected_of(CASE, *inputs))


def test_plans_are_scanned_over():
    """A Plan is a pytree: several are made first, stacked, and used later, one a step."""
    batches = [make_inputs(seed=seed) for seed in range(3)]
    x, ids, weights = (np.stack(each, 1) for each in zip(*batches, strict=True))
    config = CASE.config()

    def program(x, ids, weights):
        _, plans = jax.lax.scan(lambda _, ids: (None, ep.plan(ids, config)), None, ids)

        def step(_, each):
            x, plan, weights = each
            return None, ep.combine(ep.dispatch(x, plan), plan, weights)

        return jax.lax.scan(step, None, (x, plans, weights))[1]

    out = on_ranks(program, make_mesh(CASE.R))(x, ids, weights)
    for i, inputs in enumerate(batches):
        assert_bitwise_equal(np.asarray(out)[:, i], expected_of(CASE, *inputs))


def test_branches_and_loops():
    """Inside cond and fori_loop, whose results must have the types of their inputs."""
    layer = layer_of(CASE.config())

    def program(x, ids, weights):
        x = jax.lax.fori_loop(0, 2, lambda _, x: layer(x, ids, weights), x)
        return jax.lax.cond(jnp.bool_(True), lambda x: layer(x, ids, weights), lambda x: x, x)

    x, ids, weights = make_inputs()
    out = on_ranks(program, make_mesh(CASE.R))(x, ids, weights)
    for _ in range(3):
        x = expected_of(CASE, x, ids, weights)
    assert_bitwise_equal(out, x)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_result_types_do_not_depend_on_the_number_of_tokens(num_tokens):
    """Under check_vma every result differs between the ranks, also with T = 0 (one branch each)."""
    case = dataclasses.replace(CASE, T=num_tokens, empty_groups="block")
    seen = {}

    def program(x, ids, weights):
        plan = ep.plan(ids, case.config())
        rows = ep.dispatch(x, plan)
        results = {
            "plan": plan,
            "dispatch": rows,
            "combine": ep.combine(rows, plan, weights),
            "row_weights": ep.row_weights(weights, plan),
            "row_sources": ep.row_sources(plan),
        }
        for name, leaves in results.items():
            seen[name] = {jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(leaves)}
        return results

    jax.eval_shape(on_ranks(program, make_mesh(2)), *make_inputs(case))
    assert seen == {name: {frozenset({AXIS})} for name in seen}


def test_donated_tokens():
    """The tokens' memory is given back to XLA for the result of the same shape."""
    x, ids, weights = make_inputs()
    expected = expected_of(CASE, x, ids, weights)
    x, ids, weights = place(x, ids, weights)
    run = on_ranks(layer_of(CASE.config()), make_mesh(CASE.R))
    out = jax.jit(run, donate_argnums=0)(x, ids, weights)
    assert_bitwise_equal(out, expected)
    assert x.is_deleted()
    assert not weights.is_deleted()


def test_eager_shard_map():
    """Without jit each primitive runs by itself: dispatch and its gradient are the same.

    One rank and one token, because every primitive is compiled by itself.
    """
    case = Case(T=1, K=1, E=1, R=1, H=4)
    plan = run_plan(case, np.zeros((1, 1, 1), np.int32), implementation="auto")

    def total(x):
        run = jax.shard_map(
            lambda x, plan: ep.dispatch(x[0], jax.tree.map(lambda leaf: leaf[0], plan))[None],
            mesh=make_mesh(1),
            in_specs=P(AXIS),
            out_specs=P(AXIS),
        )
        rows = run(x, plan)
        return jnp.sum(rows * rows), rows

    x = make_floats(1, 1, 4)
    gradient, rows = jax.grad(total, has_aux=True)(x)
    assert_bitwise_equal(rows, x)
    assert_bitwise_equal(gradient, 2 * x)


def test_no_transfer_between_host_and_device():
    """B4, C3: nothing is read back to size a buffer; a step runs under transfer_guard."""
    inputs = make_inputs(maker="skewed")
    placed = place(*inputs)
    run = on_ranks(layer_of(CASE.config("auto")), make_mesh(CASE.R))
    run(*placed)
    with jax.transfer_guard("disallow"):
        out = jax.block_until_ready(run(*placed))
    assert_bitwise_equal(out, expected_of(CASE, *inputs))


def named_values(op):
    """The names of `checkpoint_name` in a program, with how many arrays have each."""
    names = re.findall(r"name\[name=(\w+)\]", str(jax.make_jaxpr(op)(*make_inputs())))
    return {name: names.count(name) for name in names}


def test_names_for_checkpoint():
    """Nine arrays of the plan, the rows, and the result can be named in a checkpoint policy."""
    run = on_ranks(layer_of(CASE.config("auto")), make_mesh(CASE.R))
    assert named_values(run) == {"ep_plan": len(oracle.LEAVES), "ep_rows": 1, "ep_out": 1}


def saved_for_the_gradient(f, *args):
    """Types of the arrays that the forward pass leaves to the backward pass."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        jax.ad_checkpoint.print_saved_residuals(f, *args)
    return [line.split()[0] for line in printed.getvalue().splitlines()]


X, IDS, WEIGHTS, OUT = "f32[8,8]", "i32[8,2]", "f32[8,2]", "f32[8,8]"
ROWS = "f32[40,8]"  # 2 ranks with C = down(16 + 4, 2)
SLOTS, OWNERS, PER_EXPERT, BY_SOURCE, SCALAR = "i32[16,2]", IDS, "i32[8]", "i32[4,4]", "i32[2]"


@pytest.mark.parametrize(
    ("names", "saved"),
    [
        ((), [X, IDS, WEIGHTS]),
        (
            ("ep_plan",),
            [X, WEIGHTS, SLOTS, OWNERS, BY_SOURCE, *[PER_EXPERT] * 3, *[SCALAR] * 3],
        ),
        (("ep_rows", "ep_out"), [IDS, WEIGHTS, ROWS, OUT]),
    ],
    ids=["nothing", "plan", "rows"],
)
def test_what_a_checkpoint_policy_saves(names, saved):
    """Both ranks' arrays: a saved plan spares the ids, saved rows spare the tokens."""
    config = CASE.config("auto")
    x, ids, weights = make_inputs()

    def layer(x, weights, ids):
        plan = ep.plan(ids, config)
        return jnp.tanh(ep.combine(jnp.tanh(ep.dispatch(x, plan)), plan, weights))

    policy = jax.checkpoint_policies.save_only_these_names(*names)
    run = on_ranks(jax.checkpoint(layer, policy=policy), make_mesh(CASE.R))
    assert sorted(saved_for_the_gradient(run, x, weights, ids)) == sorted(saved)


def test_rows_are_saved_for_the_gradient_of_weights_only():
    """Without weights the gradient of combine is a dispatch, which needs the plan and no rows."""
    _, ids, weights = make_inputs()
    plan = run_plan(CASE, ids)
    y = make_floats(CASE.R, plan.capacity, CASE.H)
    combine = on_ranks(ep.combine, make_mesh(CASE.R))
    assert ROWS in saved_for_the_gradient(lambda y, w: combine(y, plan, w), y, weights)
    assert ROWS not in saved_for_the_gradient(lambda y: combine(y, plan), y)
