"""One process of several, if tests/launch.py started it as one."""

import os

import jax

COORDINATOR = os.environ.get("JAX_MOE_EP_COORDINATOR")


def join() -> None:
    """Before JAX is used. Process p takes GPU p of the machine, or a CPU device."""
    if COORDINATOR is None:
        return
    process = int(os.environ["JAX_MOE_EP_PROCESS"])
    num_processes = int(os.environ["JAX_MOE_EP_NUM_PROCESSES"])
    jax.distributed.initialize(COORDINATOR, num_processes, process, local_device_ids=[process])
