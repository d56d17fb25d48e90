"""plan, dispatch, combine and its backward on one GPU, against a device copy and XLA's own forms.

Each op is compared with a device copy of the bytes it must move, in the same run.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import typer
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jax_moe_ep as ep
from benchmarks.shapes import Shape, bytes_moved, sweep
from benchmarks.timing import RESULTS, save, time_us

OPS = ("dispatch", "combine", "combine_backward")
BYTES_BEYOND_L2 = 400e6  # several times the 50 MB of an H200


def on_one_rank(op: Callable[..., Any]) -> Callable[..., Any]:
    mesh = Mesh(np.array(jax.devices()[:1]), ("expert",))
    return jax.shard_map(op, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)


def steps(shape: Shape) -> dict[str, Callable[..., Any]]:
    """Each op, and how stock XLA would write it, over (plan, ids, x, y, weights)."""
    config = shape.config(implementation="cuda")

    def backward(plan, ids, x, y, weights):
        return jax.vjp(lambda y, w: ep.combine(y, plan, w), y, weights)[1](x)

    def gathered(plan, ids, x, y, weights):
        source = ep.row_sources(plan)
        return jnp.where(source[:, None] >= 0, x[source // shape.K], 0)

    def sorted_gather(plan, ids, x, y, weights):
        return x[jnp.argsort(ids.reshape(-1), stable=True) // shape.K]  # A = 1 only

    def gathered_sum(plan, ids, x, y, weights):
        rows = y[plan.slots].astype(jnp.float32)
        return (rows * weights[..., None]).sum(1).astype(y.dtype)

    def scatter_add(plan, ids, x, y, weights):
        source = ep.row_sources(plan)
        scaled = y.astype(jnp.float32) * weights.reshape(-1)[source][:, None]
        scaled = jnp.where(source[:, None] >= 0, scaled, 0)
        return jnp.zeros((shape.T, shape.H), jnp.float32).at[source // shape.K].add(scaled)

    return {
        "plan": lambda plan, ids, x, y, weights: ep.plan(ids, config).slots,
        "dispatch": lambda plan, ids, x, y, weights: ep.dispatch(x, plan),
        "combine": lambda plan, ids, x, y, weights: ep.combine(y, plan, weights),
        "combine_backward": backward,
        "xla dispatch: gather": gathered,
        "xla dispatch: sort": sorted_gather,
        "xla combine: gather and sum": gathered_sum,
        "xla combine: scatter-add": scatter_add,
    }


def make_inputs(shape: Shape, config: ep.EpConfig) -> list[tuple[Any, ...]]:
    random = np.random.default_rng(0)
    capacity = config.num_rows(1, shape.T, shape.K)
    count = int(np.clip(BYTES_BEYOND_L2 / (shape.row_bytes * max(capacity, 1)), 2, 8))
    make_plan = jax.jit(on_one_rank(lambda ids: ep.plan(ids, config)))
    inputs = []
    for i in range(count):
        keys = jax.random.split(jax.random.key(i), 3)
        ids = jnp.asarray(shape.ids(random))
        x = jax.random.normal(keys[0], (shape.T, shape.H), jnp.bfloat16)
        y = jax.random.normal(keys[1], (capacity, shape.H), jnp.bfloat16)
        weights = jax.random.uniform(keys[2], (shape.T, shape.K))
        inputs.append((make_plan(ids), ids, x, y, weights))
    return inputs


@functools.cache
def copy_us(num_bytes: int) -> float:
    """Device copy that reads and writes num_bytes in all."""
    size = max(num_bytes // 4, 1)  # of bf16, half read and half written
    arrays = [(jnp.full(size, i, jnp.bfloat16),) for i in range(3)]
    return time_us(jnp.copy, arrays)


def measure(shape: Shape, with_xla: bool) -> list[dict[str, Any]]:
    inputs = make_inputs(shape, shape.config(implementation="cuda"))
    plan = inputs[0][0]
    assert int(plan.num_dropped) == 0
    live, aligned = int(plan.group_counts.sum()), int(plan.group_sizes.sum())
    rows = []
    for name, step in steps(shape).items():
        if name.startswith("xla") and not with_xla:
            continue
        # plan is short: enough calls in one program that the device does not wait for the host.
        us = time_us(on_one_rank(step), inputs * (16 // len(inputs) if name == "plan" else 1))
        row = {**vars(shape), "op": name, "us": us}
        if name in OPS:
            row["bytes"] = bytes_moved(name, shape, live, aligned, plan.capacity)
            row["copy_us"] = copy_us(row["bytes"])
            row["ratio"] = us / row["copy_us"]
            row["copy_TBps"] = row["bytes"] / row["copy_us"] * 1e-6
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("T", "H", "K", "A", "tail", "op", "us", "MB", "copy us", "ratio")
    for r in rows:
        point = [str(r[letter]) for letter in ("T", "H", "K", "A", "tail")]
        limit = []
        if "bytes" in r:
            limit = [f"{r['bytes'] / 1e6:.0f}", f"{r['copy_us']:.0f}", f"{r['ratio']:.2f}"]
        table.add_row(*point, r["op"], f"{r['us']:.1f}", *limit)
    Console(width=120).print(table)


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Time against T at the standard point, with the copy of the same bytes."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    standard = Shape()
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for color, op in enumerate(OPS):
        points = sorted(
            (r["T"], r["us"], r["copy_us"])
            for r in rows
            if r["op"] == op and {**vars(standard), "T": r["T"]}.items() <= r.items()
        )
        tokens, us, copy = zip(*points, strict=True)
        axes.loglog(tokens, us, "o-", color=f"C{color}", label=op)
        axes.loglog(tokens, copy, ":", color=f"C{color}", label=f"copy of {op}'s bytes")
    axes.set(xlabel="tokens T", ylabel="µs", title="One GPU, H = 7168, K = 8, A = 128, bf16")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main(
    out: Annotated[pathlib.Path, typer.Option(help="Folder of the JSON and the plot.")] = RESULTS,
    quick: Annotated[bool, typer.Option(help="The standard point only; local-quick.json.")] = False,
) -> None:
    shapes = sweep()[:2] if quick else sweep()
    rows = []
    for shape in track(shapes, "measuring"):
        rows += measure(shape, with_xla=shape.tail == "zero" or quick)
    show(rows)
    print(save("local" + "-quick" * quick, rows, out))
    if not quick:
        plot(rows, out / "local.png")


if __name__ == "__main__":
    typer.run(main)
