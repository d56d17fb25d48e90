"""One process of several, if tests/launch.py started it as one."""

import os

import jax

COORDINATOR = os.environ.get("JAX_MOE_EP_COORDINATOR")


def join(sees_own_gpu_only: bool = False) -> None:
    """Before JAX is used. Process p takes GPU p of the machine, or a CPU device. It sees those of
    the others too, or none of them, as batch systems may start it."""
    if COORDINATOR is None:
        return
    process = int(os.environ["JAX_MOE_EP_PROCESS"])
    num_processes = int(os.environ["JAX_MOE_EP_NUM_PROCESSES"])
    index = process
    if sees_own_gpu_only:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7").split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[process]
        index = 0
    jax.distributed.initialize(COORDINATOR, num_processes, process, local_device_ids=[index])
