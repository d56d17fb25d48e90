"""What no op between GPUs can be faster than: P, of the links, and M, of links and memory."""

import functools
import math
import statistics
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.group import Bench
from benchmarks.shapes import GroupShape, most_of_a_rank, traffic
from benchmarks.stock import AXIS

# Copies of fewer bytes of a rank to all others are launches, and their memory is in L2.
LEAST_COPIED_BYTES = 64e6
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
def peer_copy_us(bench: Bench, remote: tuple[tuple[int, ...], ...]) -> dict[str, float]:
    """By order. Of few bytes at the rate of many: copied are so many times as many of each pair."""
    once = np.array(remote)
    factor = math.ceil(LEAST_COPIED_BYTES / max(most_of_a_rank(once), 1))
    times = bench.peer_copies(list(bench.mesh.devices.flat), (factor * once).tolist())
    return {order: us / factor for order, us in times.items()}


def peer_us(bench: Bench, remote: np.ndarray) -> dict[str, float]:
    """P of these bytes and, if it was measured, what each order of the copies took. Empty where P
    is not known, which is printed if it should be."""
    if bench.peer_gbps is not None:
        return {"P_us": most_of_a_rank(remote) / bench.peer_gbps * 1e-3}
    if jax.process_count() > 1 or bench.mesh.size == 1:
        return {}
    try:
        times = peer_copy_us(bench, tuple(map(tuple, remote.tolist())))
    except RuntimeError as error:  # the ops are worth measuring all the same
        print(f"P is left out: {error}", file=sys.stderr)
        return {}
    return {"P_us": min(times.values())} | {f"P_{order}_us": us for order, us in times.items()}


def limits(
    bench: Bench, shape: GroupShape, ids: np.ndarray, bytes_per_us: float
) -> dict[str, dict[str, float]]:
    """By op: the bytes in the memory of the rank that moves most; the most that a rank sends to
    all others, or receives, and the same with its own tokens; P, and M, which is not known without
    P. combine's bytes take P the other way."""
    p = peer_us(bench, traffic("dispatch", shape, ids).remote)
    result = {}
    for op in LIMITED:
        moved = traffic(op, shape, ids)
        local = int(moved.local.max())
        result[op] = {
            "local_bytes": local,
            "remote_bytes": most_of_a_rank(moved.remote),
            "routed_bytes": most_of_a_rank(moved.routed),
        }
        if p:
            result[op] |= p | {"M_us": max(p["P_us"], local / bytes_per_us)}
    there, back = result["dispatch"], result["combine"]
    result["dispatch_backward"] = back
    result["plan_and_dispatch"] = there
    result["round_trip"] = {key: there[key] + back[key] for key in there}
    return result


def describe_limits(
    bench: Bench, bytes_per_us: float, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """How they were found; P_GBps is P's rate at the first point that has it."""
    how = "every rank's copies to all others by the copy engines in this run, in the faster of two "
    how += "orders; rows without P_us: it failed"
    if jax.process_count() > 1:
        how = "left out: only one process can copy to all GPUs"
    if bench.peer_gbps is not None:
        how = f"remote_bytes at {bench.peer_gbps} GB/s, given with --peer-gbps"
    rates = [row["remote_bytes"] / row["P_us"] * 1e-3 for row in rows if "P_us" in row]
    return {
        "copy_TBps": bytes_per_us * 1e-6,
        "P": how,
        **({"P_GBps": rates[0]} if rates else {}),
        "M": "max(P, local_bytes at copy_TBps)",
    }
