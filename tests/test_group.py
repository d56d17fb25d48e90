"""The kernels between GPUs where they could go wrong: who waits for whom, what is reused, and when.

On 2, 4 or 8 GPUs, all that there are, driven by one process or by one each. The semantic suite runs
there too.
"""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import group_steps
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import (
    AXIS,
    Case,
    assert_bitwise_equal,
    assert_plans_equal,
    collect,
    make_floats,
    make_ids,
    make_mesh,
    on_ranks,
    one_process,
    spread,
)
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_moe_ep as ep
from jax_moe_ep import cuda

GPUS = [device for device in jax.devices() if device.platform == "gpu"]
R = max(r for r in (2, 4, 8) if r <= max(len(GPUS), 2))
GPUS = GPUS[:R]
pytestmark = pytest.mark.skipif(len(GPUS) < R, reason="needs two GPUs")

BASE = Case(T=64, K=4, E=16, R=R, A=8, H=256)
TIMEOUT_S = 20.0  # a hang is an error that says who waits
DELAY_NS = 200_000


def cuda_config(case, axis_name=AXIS, **options):
    return dataclasses.replace(case.config("cuda", axis_name), timeout_s=TIMEOUT_S, **options)


@pytest.fixture(autouse=True)
def no_failure():
    yield
    set_delay(None)
    ep.check()


def set_delay(rank, ns=DELAY_NS):
    """Calls of this rank begin late; None: of nobody."""
    for i, device in enumerate(GPUS):
        if device.process_index == jax.process_index():
            delay = ns if i == rank else 0
            cuda.extension("test").set_fault(device=device.local_hardware_id, delay_ns=delay)


def run_on(mesh, op, *args, axes=(AXIS,), check_vma=True):
    """op on every rank of the mesh; arguments and results hold the ranks in front."""
    run = on_ranks(op, mesh, axes, check_vma)
    return collect(run(*spread(args, mesh, P(*axes))))


@functools.cache
def layer_of(config):
    """Plan, rows, output of experts that square, and gradients."""

    def layer(x, ids, weights, dout):
        plan = ep.plan(ids, config)
        rows, pull_rows = jax.vjp(lambda x: ep.dispatch(x, plan), x)
        y = lax.optimization_barrier(rows * rows)
        out, pull = jax.vjp(lambda y, w: ep.combine(y, plan, w), y, weights)
        dy, dw = pull(dout)
        return plan, rows, out, dy, dw, pull_rows(rows)[0]

    return layer


def make_inputs(case, maker="uniform", seed=0):
    return (
        make_floats(R, case.T, case.H, seed=seed),
        make_ids(maker, case, seed),
        make_floats(R, case.T, case.K, seed=seed + 1),
        make_floats(R, case.T, case.H, seed=seed + 2),
    )


def assert_layer_right(results, case, inputs):
    x, ids, weights, dout = inputs
    plan, rows, out, dy, dw, dx = results
    expected = oracle.plan(case, ids)
    slots, owners = expected["slots"], expected["owners"]
    assert_plans_equal(plan, expected)
    want = oracle.dispatch(case, x, slots)
    assert_bitwise_equal(rows, want, "rows")
    y = want * want
    assert_bitwise_equal(out, oracle.combine(case, y, slots, owners, weights), "out")
    want_dy, want_dw = oracle.combine_backward(case, dout, y, slots, weights)
    want_dy[oracle.row_sources(case, slots) < 0] = 0
    assert_bitwise_equal(dy, want_dy, "dy")
    np.testing.assert_allclose(dw, want_dw, rtol=1e-4, atol=1e-4)
    assert (dw[owners < 0] == 0).all()
    assert_bitwise_equal(dx, oracle.combine(case, want, slots, owners), "dx")


def check_layer(case, maker="uniform", mesh=None, **options):
    inputs = make_inputs(case, maker)
    mesh = make_mesh(R) if mesh is None else mesh
    results = run_on(mesh, layer_of(cuda_config(case, **options)), *inputs)
    assert_layer_right(results, case, inputs)


# Meshes.


@one_process
def test_a_mesh_in_reverse_right_after_one_in_order():
    """A11: the same shapes, options and devices; the ranks have changed."""
    for devices in (GPUS, GPUS[::-1], GPUS):
        check_layer(BASE, mesh=Mesh(np.array(devices), (AXIS,)))


@pytest.mark.parametrize("axes", [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("shape", sorted({(1, R), (2, R // 2), (R // 2, 2), (R, 1)}))
def test_a_group_over_two_axes(shape, axes):
    """Ranks count in row-major order of the tuple: with ("b", "a") not in the order of devices."""
    mesh = Mesh(np.array(GPUS).reshape(shape), ("a", "b"))
    inputs = make_inputs(BASE)
    layer = layer_of(cuda_config(BASE, axes))
    assert_layer_right(run_on(mesh, layer, *inputs, axes=(axes,)), BASE, inputs)


# EP beside a data axis: R / num_ranks groups, whose ranks are neighbours or R / num_ranks apart.
each_order = pytest.mark.parametrize("axes", [("data", AXIS), (AXIS, "data")], ids="-".join)
each_group_size = pytest.mark.parametrize(
    "num_ranks",
    [
        pytest.param(n, marks=pytest.mark.skipif(2 * n > R, reason=f"needs {2 * n} GPUs"))
        for n in (1, 2, 4)
    ],
)


def mesh_of_groups(num_ranks, axes):
    sizes = {"data": R // num_ranks, AXIS: num_ranks}
    return Mesh(np.array(GPUS).reshape([sizes[axis] for axis in axes]), axes)


@each_group_size
@each_order
def test_groups_beside_each_other(axes, num_ranks):
    """Each with inputs of its own, whoever is late; a group of one has no arena and waits for
    nobody."""
    case, mesh = dataclasses.replace(BASE, R=num_ranks), mesh_of_groups(num_ranks, axes)
    layer = layer_of(cuda_config(case))
    inputs = [x.reshape(*mesh.devices.shape, *x.shape[1:]) for x in make_inputs(BASE)]
    for late in (None, 0, R - 1):
        set_delay(late)
        results = run_on(mesh, layer, *inputs, axes=axes)
        for i in range(R // num_ranks):

            def of_group(leaf, i=i):
                return np.take(leaf, i, axes.index("data"))

            assert_layer_right(jax.tree.map(of_group, results), case, [of_group(x) for x in inputs])


@each_group_size
@each_order
def test_a_late_rank_in_one_of_several_groups(axes, num_ranks):
    """The other groups run ahead of it; tokens, weights and gradients change in every step."""
    case, mesh = dataclasses.replace(BASE, R=num_ranks), mesh_of_groups(num_ranks, axes)
    ids = make_ids("uniform", BASE).reshape(*mesh.devices.shape, BASE.T, BASE.K)
    for steps in (group_steps.dispatch_steps, group_steps.combine_steps):
        program = steps_of(steps, case, 20)
        for late in (None, 0, R - 1):
            set_delay(late, LONG_DELAY_NS)
            wrong = run_on(mesh, program, ids, axes=axes, check_vma=False)
            assert not wrong.any(), (steps.__name__, late)


@pytest.mark.skipif(R < 4, reason="needs 4 GPUs")
def test_every_gpu_in_two_groups():
    """A10: layers over "a" and over "b" of a mesh in turn. Each GPU has an arena and an epoch of
    either, and a late rank holds up one group through the other."""
    mesh = Mesh(np.array(GPUS).reshape(2, R // 2), ("a", "b"))
    x, ids, *_ = make_inputs(BASE)
    x = np.round(8 * np.abs(x))  # sums are exact, and there is no -0
    x, ids = (each.reshape(2, R // 2, *each.shape[1:]) for each in (x, ids))
    configs = [cuda_config(BASE, axis) for axis in ("a", "b")]

    def program(x, ids):
        for config in 3 * configs:
            plan = ep.plan(ids, config)
            x = ep.combine(ep.dispatch(x, plan), plan) / BASE.K
        return x

    for late in (None, *range(R)):
        set_delay(late)
        assert_bitwise_equal(run_on(mesh, program, x, ids, axes=("a", "b")), x)


# Routings at the edges.


@pytest.mark.parametrize("maker", ["masked", "one_rank", "one_expert", "empty_expert"])
def test_a_rank_with_no_rows_or_no_tokens(maker):
    """masked: the last rank has no tokens. one_rank: only the last has rows."""
    check_layer(BASE, maker)


def test_drops_at_one_receiver_only():
    case = dataclasses.replace(BASE, capacity=2 * BASE.T)
    ids = make_ids("one_rank", case)
    dropped = oracle.plan(case, ids)["num_dropped"].tolist()
    assert dropped[-1] > 0
    assert dropped[:-1] == [0] * (R - 1)
    check_layer(case, "one_rank")


@pytest.mark.parametrize("num_sms", [1, 2])
def test_few_sms(num_sms):
    check_layer(BASE, num_sms=num_sms)


def test_more_experts_a_token_than_lanes():
    check_layer(Case(T=9, K=40, E=64, R=R, A=2, H=64))


@pytest.mark.parametrize("hidden", [4, 64 * 1024], ids=["16B", "256KB"])
def test_row_lengths(hidden):
    check_layer(dataclasses.replace(BASE, T=8, H=hidden))


def test_more_tokens_than_flags():
    """T = 16,384 + 40: neighbouring tokens share a flag."""
    case = Case(T=16 * 1024 + 40, K=2, E=8, R=R, A=1, H=8)
    config = cuda_config(case)

    def step(x, ids):
        plan = ep.plan(ids, config)
        return ep.combine(ep.dispatch(x, plan), plan)

    x, ids, *_ = make_inputs(case, "masked")
    count = ((ids >= 0) & (ids < case.E)).sum(-1, keepdims=True)
    out = run_on(make_mesh(R), step, x, ids)
    assert_bitwise_equal(out, np.where(count == 0, 0, count * x).astype(np.float32) + 0)


@pytest.mark.parametrize("epoch", [2**32 - 3, 2**62 - 3])
def test_epochs_pass_the_ends_of_32_and_62_bits(epoch):
    check_layer(BASE)
    cuda.extension("test").set_epoch(epoch)
    for _ in range(3):
        check_layer(BASE)


def test_a_hog_on_most_sms():
    """Blocks that cannot run yet own no work that others wait for."""
    check_layer(BASE)  # compiled
    for device in GPUS:
        if device.process_index == jax.process_index():
            cuda.extension("test").hog(device=device.local_hardware_id, num_sms=130, ns=300_000_000)
    check_layer(BASE)


# What is reused, and when.


# Longer than any rank needs from one call to the next two, the host's part included.
LONG_DELAY_NS = 1_000_000


@functools.cache
def steps_of(steps, case, num_steps):
    """A program of group_steps.py."""
    return functools.partial(steps, config=cuda_config(case), hidden=case.H, num_steps=num_steps)


def check_steps(steps, case, *args, late=None, num_steps=20):
    """No element is wrong, on any rank, while one is late."""
    program = steps_of(steps, case, num_steps)
    for rank in (None, late):  # first compiled, and the group has met
        set_delay(rank, LONG_DELAY_NS)
        wrong = run_on(make_mesh(R), program, *args, check_vma=False)
        assert wrong.tolist() == [0] * R


each_late = pytest.mark.parametrize("late", [*sorted({0, R // 2, R - 1}), None])


@pytest.mark.parametrize("maker", ["uniform", "one_rank"])
@each_late
def test_tokens_are_not_overwritten_before_they_are_read(late, maker):
    """Edge 5. With one_rank all rows are on the last rank. When that is late, the others need
    nothing of anybody, and the next kernel overwrites x: in one process the end of dispatch must
    wait until x has been read, between processes dispatch must not stage into memory that is read.
    """
    check_steps(group_steps.dispatch_steps, BASE, make_ids(maker, BASE), late=late)


@pytest.mark.parametrize("late", [0, R - 1])
def test_many_tokens_are_not_overwritten_while_they_are_read(late):
    """Edges 4 and 5: 16 MB a rank, whose reading takes longer than all of a small call."""
    case = Case(T=1024, K=1, E=16, R=R, H=4096, capacity=R * 1024)
    check_steps(group_steps.dispatch_steps, case, make_ids("one_rank", case), late=late)


def test_peers_are_told_once_all_tokens_are_there():
    """Edges 1 and 2. Rank 0 is late; only the last 64 of its 4096 tokens have rows, on a rank that
    already waits for them and reads them the moment it is told. Staging 64 MB takes far longer."""
    case = Case(T=4096, K=1, E=16, R=R, H=4096, capacity=R * 64)
    ids = make_ids("one_rank", case)
    ids[:, :-64] = -1
    check_steps(group_steps.dispatch_steps, case, ids, late=0, num_steps=10)


def test_tokens_that_are_written_late_are_waited_for():
    """Edge 1. The reader comes to dispatch while the last kernels that write rank 0's x have not
    been launched: what it finds at the address of the call before is not the tokens."""
    num_slow = np.zeros(R, np.int32)
    num_slow[0] = group_steps.GROWTH
    check_steps(group_steps.slow_dispatch_steps, BASE, make_ids("one_rank", BASE), num_slow)


@pytest.mark.parametrize("maker", ["uniform", "one_rank"])
@each_late
def test_changing_weights_and_gradients(late, maker):
    """Edges 1, 6 and 7: weights and dout of this step, partials and weight gradients of all ranks,
    although a rank is late whose memory still holds those of the last steps."""
    check_steps(group_steps.combine_steps, BASE, make_ids(maker, BASE), late=late)


@each_late
def test_calls_that_use_one_half_for_different_things(late):
    """Edge 5. The last rank stages its tokens where the weights of a combine two calls later lie,
    which the others write without waiting for that rank."""
    check_steps(group_steps.mixed_steps, BASE, make_ids("one_rank", BASE), late=late)


@pytest.mark.parametrize("num_tokens", [3, 64, 8192])
def test_a_thousand_plans_of_changing_ids(num_tokens):
    """The ids of both parities are overwritten with either rank ahead: 12 words a rank, by one
    block, and 128 KB by several. Rows are exactly where XLA's all_gather has the rank's experts."""
    case = dataclasses.replace(BASE, T=num_tokens)
    config = cuda_config(case)

    def program(ids):
        def step(i, wrong):
            now = (ids + i) % case.E
            everyone = lax.all_gather(now, AXIS, tiled=True)
            is_here = everyone // case.num_local == lax.axis_index(AXIS)
            return wrong + ((ep.plan(now, config).slots >= 0) != is_here).sum()

        return lax.fori_loop(0, 100, step, jnp.zeros((), jnp.int32))

    ids = make_ids("uniform", case)
    for turn in range(10):
        wrong = run_on(make_mesh(R), program, ids, check_vma=False)
        assert wrong.tolist() == [0] * R, turn
        set_delay(turn % R, 20_000)


@pytest.mark.parametrize("num_shapes", [1, 2])
def test_a_thousand_combines_with_changing_rows(num_shapes):
    """The landing areas of both parities are reused with either rank ahead; with two shapes that
    lie differently in one region. Values are small integers: sums are exact."""
    cases = [BASE, dataclasses.replace(BASE, T=24, H=128)][:num_shapes]
    configs = [cuda_config(case) for case in cases]
    ids = [make_ids("uniform", case) for case in cases]

    def program(*ids):
        plans = [ep.plan(i, config) for i, config in zip(ids, configs, strict=True)]

        def step(i, wrong):
            for case, plan in zip(cases, plans, strict=True):
                rank = lax.axis_index(AXIS)
                row = jnp.arange(plan.capacity, dtype=jnp.float32)[:, None] % 13
                y = row + i + rank + jnp.zeros((1, case.H))
                out = ep.combine(y, plan)
                want = jnp.zeros((case.T, case.H))
                landed = lax.all_gather(plan.slots, AXIS).reshape(R, R, case.T, case.K)
                for peer in range(R):
                    slots = landed[peer, rank]
                    value = (slots % 13) + i + peer
                    want += jnp.where(slots >= 0, value, 0).sum(-1, keepdims=True)
                wrong += (out != want).sum()
            return wrong

        return lax.fori_loop(0, 100, step, jnp.zeros((), jnp.int32))

    for turn in range(10):
        wrong = run_on(make_mesh(R), program, *ids, check_vma=False)
        assert wrong.tolist() == [0] * R, turn
        set_delay(turn % R, 20_000)


def test_the_same_bits_on_every_run():
    case = dataclasses.replace(BASE, K=8)
    inputs = make_inputs(case)
    layer = layer_of(cuda_config(case))
    first = run_on(make_mesh(R), layer, *inputs)
    for turn in range(10):
        set_delay(turn if turn < R else None)
        again = run_on(make_mesh(R), layer, *inputs)
        for got, want in zip(jax.tree.leaves(again), jax.tree.leaves(first), strict=True):
            assert_bitwise_equal(got, want)


def test_calls_without_a_dependency_between_them():
    """A10: two layers beside each other in one program, with two routings."""
    config = cuda_config(BASE)

    def program(x, first, second):
        plans = [ep.plan(ids, config) for ids in (first, second)]
        return [ep.combine(ep.dispatch(x, plan), plan) for plan in plans]

    x, *_ = make_inputs(BASE)
    ids = [make_ids("uniform", BASE, seed) for seed in (0, 1)]
    for out in run_on(make_mesh(R), program, x, *ids):
        assert_bitwise_equal(out, x * np.float32(BASE.K))


def test_captured_and_replayed_with_other_routings():
    """C3, C5: 200 executions of changing routing with few launches by the host."""
    config = cuda_config(BASE)

    def program(x, ids):
        for _ in range(4):
            plan = ep.plan(ids, config)
            x = ep.combine(ep.dispatch(x, plan), plan)
        return x

    x = np.round(make_floats(R, BASE.T, BASE.H) * 8)
    mesh = make_mesh(R)
    run = on_ranks(program, mesh)
    routings = [spread(make_ids("uniform", BASE, seed), mesh, P(AXIS)) for seed in range(4)]
    x = spread(x, mesh, P(AXIS))
    want = collect(x) * np.float32(BASE.K**4) + np.float32(0)  # combine has no -0
    assert_bitwise_equal(collect(run(x, routings[0])), want)
    before = cuda.extension("test").num_executions()
    for i in range(200):
        out = run(x, routings[i % 4])
        if i % 20 == 0:
            assert_bitwise_equal(collect(out), want)
    assert_bitwise_equal(collect(out), want)
    executions = cuda.extension("test").num_executions() - before
    assert executions < 200 * 8 * len(jax.local_devices()) / 2


# In a process of its own.

COLD = pathlib.Path(__file__).parent / "cold_process.py"
GROWING = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
FORCE_STAGED = "JAX_MOE_EP_FORCE_STAGED"


@one_process
@pytest.mark.parametrize(
    "environment",
    [
        GROWING,
        {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"},
        {**GROWING, "XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async"},
        {**GROWING, "JAX_MOE_EP_FORCE_VECTOR": "1"},
        {**GROWING, FORCE_STAGED: "1"},
        {**GROWING, "XLA_FLAGS": "--xla_gpu_graph_min_graph_size=1"},
    ],
    ids=["bfc", "platform", "cuda_async", "vector", "staged", "graphs"],
)
def test_in_a_cold_process(environment):
    """The first cuBLAS and tokamax kernels load between dispatch and combine, which wait."""
    run_cold(environment)


@one_process
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("x", "jax_moe_ep.dispatch: x"),
        ("dout", "jax_moe_ep.combine: the gradient of its result"),
    ],
)
def test_a_constant_that_peers_cannot_read_is_an_error(name, what):
    """XLA keeps constants in memory of a module, which only its own GPU maps. The error comes
    before anything is launched: the group goes on."""
    output = run_cold({**GROWING, FORCE_STAGED: "0"}, name)
    assert f"{what} is memory that the other GPUs of the process cannot read" in output
    assert "Pass it as an argument of the jitted function" in output


@one_process
@pytest.mark.parametrize("name", ["x", "dout"])
def test_a_constant_is_staged(name):
    """Then its own GPU alone reads it."""
    assert "right as a constant" in run_cold({**GROWING, FORCE_STAGED: "1"}, name)


def run_cold(environment, *args):
    """What it prints, when it ends as it should."""
    done = subprocess.run(
        [sys.executable, COLD, *args],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "right" in done.stdout
    return done.stdout
