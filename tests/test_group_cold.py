"""A layer on 2, 4 or 8 GPUs in a process of its own, whose environment and memory are new."""

import os
import pathlib
import subprocess
import sys

import pytest
from groups import needs_gpus
from helpers import one_process

pytestmark = [needs_gpus, one_process]

COLD = pathlib.Path(__file__).parent / "cold_process.py"
GROWING = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
FORCE_STAGED = "JAX_MOE_EP_FORCE_STAGED"


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
