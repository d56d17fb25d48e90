"""What no op between GPUs can be faster than: P, of the links, and M, of links and memory."""

import functools
import statistics
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.group import Bench
from benchmarks.shapes import GroupShape, traffic
from benchmarks.stock import AXIS
from benchmarks.timing import busy_ns

NUM_PEER_COPIES = 8
LIMITED = ("dispatch", "combine", "combine_backward")


def copy_rate(bench: Bench, num_bytes: float = 1e9) -> float:
    """Bytes a microsecond of a copy from device to device, read and written, on all at once."""
    shape = bench.mesh.size, int(num_bytes) // 4  # of bf16, half read and half written
    sharding = NamedSharding(bench.mesh, P(AXIS))
    make = jax.jit(lambda i: jnp.full(shape, i, jnp.bfloat16), out_shardings=sharding)
    arrays = [make(i) for i in range(3)]
    copy = jax.jit(lambda arrays: [jnp.copy(array) for array in arrays])
    (times,) = bench.times([(copy, (arrays,))])
    return num_bytes * len(arrays) / statistics.median(times)


@functools.cache
def peer_copy_us(bench: Bench, remote: tuple[tuple[int, ...], ...]) -> float:
    """Every rank's bytes to every other, at once, by the copy engines.

    Several copies follow each other, so that those of all directions run together; the time is
    that in which at least one runs on the slowest GPU, without what the host takes to start them.
    """
    devices = list(bench.mesh.devices.flat)
    sources, targets = [], []
    for i in range(NUM_PEER_COPIES):
        for source, target in np.ndindex(len(remote), len(remote)):
            if source != target:
                size = max(remote[source][target], 16)  # no bytes would leave no trace
                sources.append(jax.device_put(jnp.full(size, i, jnp.uint8), devices[source]))
                targets.append(devices[target])
    copy = functools.partial(jax.device_put, device=targets)
    (times,) = bench.times([(copy, (sources,))], duration=busy_ns)
    return statistics.median(times) / NUM_PEER_COPIES


def peer_us(bench: Bench, remote: np.ndarray) -> float | None:
    """P of these bytes; None where it is not known, which is printed if it should be."""
    if bench.peer_gbps is not None:
        return float(remote.max()) / bench.peer_gbps * 1e-3
    if jax.process_count() > 1 or bench.mesh.size == 1:
        return None
    try:
        return peer_copy_us(bench, tuple(map(tuple, remote.tolist())))
    except RuntimeError as error:  # the ops are worth measuring all the same
        print(f"P is left out: {error}", file=sys.stderr)
        return None


def limits(
    bench: Bench, shape: GroupShape, ids: np.ndarray, bytes_per_us: float
) -> dict[str, dict[str, float]]:
    """By op: the bytes in the memory of the rank that moves most, the most from one rank to
    another, P, and M, which is not known without P. combine's bytes take P the other way."""
    p = peer_us(bench, traffic("dispatch", shape, ids).remote)
    result = {}
    for op in LIMITED:
        moved = traffic(op, shape, ids)
        local, remote = int(moved.local.max()), int(moved.remote.max())
        result[op] = {"local_bytes": local, "remote_bytes": remote}
        if p is not None:
            result[op] |= {"P_us": p, "M_us": max(p, local / bytes_per_us)}
    there, back = result["dispatch"], result["combine"]
    result["dispatch_backward"] = back
    result["plan_and_dispatch"] = there
    result["round_trip"] = {key: there[key] + back[key] for key in there}
    return result


def describe_limits(bench: Bench, bytes_per_us: float) -> dict[str, Any]:
    how = "two-way copy by the copy engines in this run; rows without P_us: it failed"
    if jax.process_count() > 1:
        how = "left out: device_put cannot copy between processes"
    if bench.peer_gbps is not None:
        how = f"remote_bytes at {bench.peer_gbps} GB/s, given with --peer-gbps"
    return {"copy_TBps": bytes_per_us * 1e-6, "P": how, "M": "max(P, local_bytes at copy_TBps)"}
