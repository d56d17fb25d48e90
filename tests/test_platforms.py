"""What an op becomes on a platform: its kernel, the reference, or an error that says why not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from errors import raises
from helpers import (
    AXIS,
    DEVICES,
    IMPLEMENTATIONS,
    Case,
    devices,
    make_mesh,
    on_ranks,
    planner,
    run_plan,
)
from jax.sharding import Mesh

import jax_moe_ep as ep
from jax_moe_ep import cuda

CASE = Case(T=4, K=2, E=4, R=2, H=4)
IDS = np.zeros((2, 4, 2), np.int32)


def lowered(op, implementation, platform, num_ranks=1, hidden=16, dtype=np.float32):
    """The text of the program of one op, for a platform that need not be here."""
    mesh = Mesh(np.array(devices(num_ranks)), (AXIS,))
    case = dataclasses.replace(CASE, R=num_ranks)
    ids = IDS[:num_ranks]
    plan = run_plan(case, ids)
    plan = dataclasses.replace(plan, config=case.config(implementation))
    x = np.zeros((num_ranks, 4, hidden), dtype)
    y = np.zeros((num_ranks, plan.capacity, hidden), dtype)
    weights = np.zeros((num_ranks, 4, 2), np.float32)

    def backward(f, x, dout):
        return jax.vjp(f, x)[1](dout)

    program, args = {
        "plan": (planner(plan.config), (ids, None)),
        "dispatch": (ep.dispatch, (x, plan)),
        "combine": (ep.combine, (y, plan, weights)),
        "combine_backward": (
            lambda w, y, plan, dout: backward(lambda w: ep.combine(y, plan, w), w, dout),
            (weights, y, plan, x),
        ),
        "row_weights": (ep.row_weights, (weights, plan)),
        "row_weights_backward": (
            lambda w, plan, drow: backward(lambda w: ep.row_weights(w, plan), w, drow),
            (weights, plan, np.zeros((num_ranks, plan.capacity), np.float32)),
        ),
    }[op]
    traced = on_ranks(program, mesh).trace(*args)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_cuda_compiled_for_another_platform(op):
    """The forward op of a backward is refused first, and names itself."""
    forward = op.removesuffix("_backward")
    message = "implementation='cuda' needs CUDA devices, and this program is compiled for another"
    with raises(NotImplementedError, f"jax_moe_ep.{forward}", message, "'auto' or 'reference'"):
        lowered(op, "cuda", "cpu")


@pytest.mark.parametrize("implementation", ["auto", "cuda"])
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_lowering_for_cuda(op, implementation):
    """The op's custom call, or an error that says what is missing; never a silent reference."""
    if cuda._ffi is not None:
        assert f"custom_call @jax_moe_ep_{op}(" in lowered(op, implementation, "cuda")
        return
    with raises(NotImplementedError, "jax_moe_ep.", "has no CUDA extension", "='reference'"):
        lowered(op, implementation, "cuda")


needs_extension = pytest.mark.skipif(cuda._ffi is None, reason="needs the CUDA extension")


@needs_extension
@pytest.mark.parametrize("op", ["dispatch", "combine", "combine_backward"])
def test_rows_of_other_lengths_have_no_kernel(op):
    """6 fp32 values are 24 bytes."""
    message = "rows of a multiple of 16 bytes of numbers, got float32[4, 6] with 24 bytes a row"
    if op != "dispatch":
        message = "rows of a multiple of 16 bytes of numbers, got float32"
    with raises(NotImplementedError, "jax_moe_ep.", message, "Pad the rows"):
        lowered(op, "auto", "cuda", hidden=6)


@needs_extension
def test_sums_of_other_types_have_no_kernel():
    message = "the CUDA kernels sum float32, float16 and bfloat16, got float8_e4m3fn"
    with raises(NotImplementedError, "jax_moe_ep.combine", message, "Convert y"):
        lowered("combine", "auto", "cuda", dtype=jnp.float8_e4m3fn)


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_reference_lowers_for_cuda_without_custom_calls(op):
    assert "custom_call @jax_moe_ep" not in lowered(op, "reference", "cuda")


def test_too_many_experts_for_the_kernels():
    """auto takes the reference elsewhere; on CUDA it says so instead of running something else."""
    config = ep.EpConfig(8192, AXIS)
    plan = on_ranks(planner(config), make_mesh(2))
    if DEVICES[0].platform == "cpu":
        assert plan(IDS, None).group_counts.shape == (2, 4096)
    with raises(NotImplementedError, "jax_moe_ep.plan:"):
        plan.trace(IDS, None).lower(lowering_platforms=("cuda",))
