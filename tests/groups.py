"""What the tests of groups on GPUs share: 2, 4 or 8 of them, all that there are, driven by one
process or by one each; a layer, its inputs, and what it must give."""

import dataclasses
import functools

import jax
import numpy as np
import oracle
import pytest
from helpers import (
    AXIS,
    DEVICES,
    NUM_RANKS,
    ON_GPUS,
    Case,
    assert_bitwise_equal,
    assert_plans_equal,
    collect,
    make_floats,
    make_ids,
    make_mesh,
    on_ranks,
    spread,
)
from jax import lax
from jax.sharding import PartitionSpec as P

import jax_moe_ep as ep
from jax_moe_ep import cuda

R = NUM_RANKS
GPUS = DEVICES[:R]
needs_gpus = pytest.mark.skipif(not ON_GPUS or len(GPUS) < R, reason="needs two GPUs")

BASE = Case(T=64, K=4, E=16, R=R, A=8, H=256)
MAX_FEW_WEIGHTS = 2**17  # of all ranks, in words: ffi/weights_group.cuh
# More of them: they cross in tables. Rows of 256 bytes.
MANY_WEIGHTS = dataclasses.replace(BASE, T=MAX_FEW_WEIGHTS // (BASE.K * R) + 76, H=64)
TIMEOUT_S = 20.0  # a hang is an error that says who waits
DELAY_NS = 200_000
# Longer than any rank needs from one call to the next two, the host's part included.
LONG_DELAY_NS = 1_000_000


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


@functools.cache
def steps_of(steps, case, num_steps):
    """A program of group_steps.py."""
    return functools.partial(steps, config=cuda_config(case), hidden=case.H, num_steps=num_steps)
