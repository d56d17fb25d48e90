"""Many steps of changing routing beside collectives and matmuls, on all GPUs. Not for pytest:

    python tests/stress.py [--steps 20000]                         one process, all GPUs
    python tests/stress.py --group-size 2                          EP groups of 2 beside each other
    python tests/launch.py --num-processes 2 -- tests/stress.py    one process a GPU

Every step gathers a weight from all GPUs and scatters its gradient as FSDP does, while tokens of
two layers move in the EP groups: the counts of every plan, the sum of every dispatched row and
every combined token are compared with what the ids say, on the device. Values are small integers,
so sums are exact. The device memory that CUDA reports must not grow.
"""

import os
import sys
import time

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_graph_min_graph_size=1"
)

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from processes import join

import jax_moe_ep as ep

T, K, E, H = 512, 4, 32, 1024
STEPS_A_CALL = 20
AXES = ("data", "expert")
SPEC = P(AXES)


def layer(x, ids, config, weight):
    """K * x exactly, and how much was wrong on the way."""
    plan = ep.plan(ids, config)
    rows = ep.dispatch(x, plan)
    named = lax.psum(jnp.zeros(E, jnp.int32).at[ids.reshape(-1)].add(1), "expert")
    me = lax.axis_index("expert")
    mine = lax.dynamic_slice_in_dim(named, me * (E // plan.num_ranks), E // plan.num_ranks)
    wrong = (plan.group_counts != mine).sum() + (plan.num_dropped != 0)
    sums = x.sum(1)  # of each token: its rows must have the same
    everyone = lax.all_gather(sums, "expert", tiled=True)
    source = ep.row_sources(plan)
    want = jnp.where(source >= 0, everyone[source // K], 0)
    wrong += (rows.sum(1) != want).sum()
    noise = (rows @ weight).sum() * 0  # a matmul between, of a gathered weight
    out = ep.combine(rows + noise, plan, jnp.ones((T, K)))
    wrong += (out != K * x).sum()
    return out / K, wrong


def make_step(mesh, config):
    def one(carry, key):
        x, shard, wrong = carry
        for i in range(2):
            weight = lax.all_gather(shard, AXES, tiled=True)  # FSDP's weight
            scores = jax.random.uniform(
                jax.random.fold_in(key, 2 * lax.axis_index(AXES) + i), (T, E)
            )
            ids = lax.top_k(scores, K)[1]
            x, bad = layer(x, ids, config, weight)
            gradient = lax.psum_scatter(weight * 0, AXES, tiled=True)
            shard, wrong = shard + gradient, wrong + bad
        # New values for the next step: small integers again.
        x = jnp.round((x + 1) * (jnp.abs(x) < 6))
        return (x, shard, wrong), None

    def steps(x, shard, wrong, keys):
        (x, shard, wrong), _ = lax.scan(one, (x, shard, wrong[0]), keys)
        return x, shard, wrong[None]

    return jax.jit(
        jax.shard_map(
            steps,
            mesh=mesh,
            in_specs=(SPEC, SPEC, SPEC, P()),
            out_specs=(SPEC, SPEC, SPEC),
            check_vma=False,
        ),
        donate_argnums=(0, 1, 2),
    )


def main(steps: int = 20_000, timeout_s: float = 30.0, group_size: int | None = None) -> None:
    join()
    num_gpus = jax.device_count()
    mesh = Mesh(np.array(jax.devices()).reshape(-1, group_size or num_gpus), AXES)
    config = ep.EpConfig(E, "expert", alignment=8, implementation="cuda", timeout_s=timeout_s)
    step = make_step(mesh, config)
    rng = np.random.default_rng(0)

    def spread(array):
        return jax.make_array_from_callback(
            array.shape, NamedSharding(mesh, SPEC), lambda index: array[index]
        )

    x = spread(rng.integers(-4, 4, (num_gpus * T, H)).astype(np.float32))
    shard = spread(rng.standard_normal((H, H)).astype(np.float32))
    wrong = spread(np.zeros(num_gpus, np.int32))
    memory, started = [], time.monotonic()
    for call in range(steps // STEPS_A_CALL):
        keys = jax.random.split(jax.random.key(call), STEPS_A_CALL)
        x, shard, wrong = step(x, shard, wrong, keys)
        if call % 50 == 49:
            total = [int(part.data[0]) for part in wrong.addressable_shards]
            ep.check()
            memory.append(max(used_bytes()))
            print(
                f"{(call + 1) * STEPS_A_CALL} steps, wrong {total}, used {memory[-1]}", flush=True
            )
            assert not any(total), total
    rate = steps / (time.monotonic() - started)
    # The driver takes its last 2 MB after the first executions.
    assert memory[-1] <= memory[min(1, len(memory) - 1)], f"device memory grew: {memory}"
    groups = f"{num_gpus} GPUs in groups of {mesh.shape['expert']}"
    print(f"stress: {steps} steps of two layers on {groups}, {rate:.0f} a second, all right")


def used_bytes() -> list[int]:
    """What cudaMemGetInfo says is used of each of this process's GPUs."""
    from jax_moe_ep import cuda

    devices = [device.local_hardware_id for device in jax.local_devices()]
    return [cuda.extension("stress").used_bytes(device) for device in devices]


if __name__ == "__main__":
    sys.exit(typer.run(main))
