"""One process for all devices, or the several that examples/multiprocess/run.py starts."""

import os

import jax


def join(num_cpu_devices: int) -> bool:
    """Before JAX is used: makes this process one of several if it was started as one.

    Process p takes GPU p of the machine. Where there are no GPUs, the processes share
    num_cpu_devices virtual devices equally.

    Returns:
      Whether this process is the one that prints and writes.
    """
    num_processes = int(os.environ.get("JAX_MOE_EP_NUM_PROCESSES", "1"))
    jax.config.update("jax_num_cpu_devices", max(num_cpu_devices // num_processes, 1))
    coordinator = os.environ.get("JAX_MOE_EP_COORDINATOR")
    if coordinator is not None:
        process = int(os.environ["JAX_MOE_EP_PROCESS"])
        jax.distributed.initialize(coordinator, num_processes, process, local_device_ids=[process])
    return jax.process_index() == 0
