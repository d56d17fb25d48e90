"""Whether the ranks of several processes read each other's tokens where XLA has them, by the
allocator that XLA uses: results are the same. One process a GPU, started by this one."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
from groups import R, needs_gpus
from helpers import one_process

pytestmark = [needs_gpus, one_process]

TESTS = pathlib.Path(__file__).parent
PREALLOCATED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".2"}
GROWING = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


# Of dispatch and combine's backward, which read tokens of peers: 4 sizes, 3 times.
NUM_CALLS = 2 * 4 * 3


def num_in_place(environment, *args):
    """Executions and captures whose tokens peers read where XLA has them. The run is right."""
    command = [sys.executable, TESTS / "launch.py", "--num-processes", str(R), "--"]
    done = subprocess.run(
        [*command, TESTS / "pool_process.py", *args],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.search(r"right, (\d+) in place", done.stdout)
    assert told, done.stdout
    return int(told[1])


@pytest.mark.parametrize("way", [{}, {"JAX_MOE_EP_FORCE_VECTOR": "1"}], ids=["bulk", "vector"])
def test_a_preallocated_pool_is_read_in_place(way):
    """It is one allocation: all that XLA ever gives out is in it."""
    assert num_in_place(PREALLOCATED | way) == NUM_CALLS


def test_processes_that_see_one_gpu_each():
    assert num_in_place(PREALLOCATED, "alone") == NUM_CALLS


def test_a_growing_pool_is_right():
    """Some arrays are in parts that the peers have mapped, later ones are not."""
    assert 0 <= num_in_place(GROWING) <= NUM_CALLS


@pytest.mark.parametrize(
    "environment",
    [
        {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"},
        GROWING | {"XLA_PYTHON_CLIENT_ALLOCATOR": "vmm"},
        GROWING | {"XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async"},
        PREALLOCATED | {"JAX_MOE_EP_FORCE_STAGED": "1"},
    ],
    ids=["platform", "vmm", "cuda_async", "forced"],
)
def test_what_cannot_be_shared_is_staged(environment):
    """Arrays with an allocation of their own, that others may follow at its address; those of the
    driver's pool; and what says so."""
    assert num_in_place(environment) == 0
