"""plan, dispatch, combine and their gradients between the GPUs of one host, against the limits of
links and memory and against stock JAX.

One process with all GPUs, or one process a GPU, started with the environment variables
JAX_MOE_EP_COORDINATOR, JAX_MOE_EP_PROCESS and JAX_MOE_EP_NUM_PROCESSES. XLA captures the programs
as CUDA graphs with XLA_FLAGS=--xla_gpu_graph_min_graph_size=1. What the GPUs share lies outside of
XLA's pool: set XLA_PYTHON_CLIENT_PREALLOCATE=false.
"""

import dataclasses
import faulthandler
import os
import pathlib
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jax_moe_ep as ep
from benchmarks import stock
from benchmarks.group import Bench, Inputs, Step, largest, make_inputs, ops
from benchmarks.shapes import GroupShape, group_sweep, quick_points, traffic
from benchmarks.timing import RESULTS, busy_ns, save, wall_times_us

NUM_PEER_COPIES = 8
TOLERANCE = 2.0**-6  # of stock sums in bf16, relative to the largest
LIMITED = ("dispatch", "combine", "combine_backward")
ROW_OPS = ("dispatch", "combine_backward", "round_trip")  # those that write rows, and so a tail

Row = dict[str, Any]


# Limits.


def copy_rate(bench: Bench, num_bytes: float = 1e9) -> float:
    """Bytes a microsecond of a copy from device to device, read and written, on all at once."""
    shape = bench.mesh.size, int(num_bytes) // 4  # of bf16, half read and half written
    sharding = NamedSharding(bench.mesh, P(stock.AXIS))
    make = jax.jit(lambda i: jnp.full(shape, i, jnp.bfloat16), out_shardings=sharding)
    arrays = [make(i) for i in range(3)]
    copy = jax.jit(lambda arrays: [jnp.copy(array) for array in arrays])
    return num_bytes * len(arrays) / statistics.median(bench.times(copy, arrays))


def peer_copy_us(bench: Bench, remote: np.ndarray) -> float:
    """Every rank's bytes to every other, at once, by the copy engines.

    Several copies follow each other, so that those of all directions run together; the time is
    that in which at least one runs on the slowest GPU, without what the host takes to start them.
    """
    devices = list(bench.mesh.devices.flat)
    sources, targets = [], []
    for i in range(NUM_PEER_COPIES):
        for source, target in np.ndindex(remote.shape):
            if source != target:
                size = max(int(remote[source, target]), 16)  # no bytes would leave no trace
                sources.append(jax.device_put(jnp.full(size, i, jnp.uint8), devices[source]))
                targets.append(devices[target])
    times = bench.times(lambda x: jax.device_put(x, targets), sources, duration=busy_ns)
    return statistics.median(times) / NUM_PEER_COPIES


def peer_us(bench: Bench, remote: np.ndarray) -> float | None:
    """P of these bytes; None where it is not known, which is printed if it should be."""
    if bench.peer_gbps is not None:
        return float(remote.max()) / bench.peer_gbps * 1e-3
    if jax.process_count() > 1 or bench.mesh.size == 1:
        return None
    try:
        return peer_copy_us(bench, remote)
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


# Measuring.


def measure(bench: Bench, shape: GroupShape, bytes_per_us: float, forms: Any = ()) -> list[Row]:
    """All ops at one point; forms are "loop" and "stock"."""
    inputs, ids, num_calls = make_inputs(bench, shape, with_stock="stock" in forms)
    limit = limits(bench, shape, ids, bytes_per_us)
    steps = ops(bench.config(shape))
    measured = [
        (op, "", bench.us(step, inputs, num_calls))
        for op, step in steps.items()
        if is_measured(op, shape)
    ]
    if "loop" in forms:
        for op in ("plan_and_dispatch", "combine"):
            measured.append((op, "in a loop", bench.loop_us(steps[op], inputs[0])))
    if "stock" in forms:
        measured += measure_stock(bench, stock.FORMS, inputs, num_calls)
    if bench.implementation == "cuda":
        ep.check()
    return [make_row(shape, *each, limit.get(each[0], {})) for each in measured]


def is_measured(op: str, shape: GroupShape) -> bool:
    """What only reads rows takes the same time with any tail."""
    return op in ROW_OPS if shape.tail == "undefined" else op != "plan_and_dispatch"


def make_row(shape: GroupShape, op: str, form: str, us: float, limit: dict[str, float]) -> Row:
    row = {**vars(shape), "C": shape.num_rows, "op": op, "form": form, "us": us, **limit}
    return row | {"ratio": us / limit["M_us"]} if "M_us" in limit else row


def measure_stock(
    bench: Bench,
    forms: dict[str, dict[str, Callable[..., Any]]],
    inputs: Sequence[Inputs],
    num_calls: int,
) -> list[tuple[str, str, float]]:
    """Every form's op, name and microseconds, after a comparison with ours."""
    ours = ops(inputs[0].plan.config)

    def stock_step(op: str, form: Callable[..., Any]) -> Step:
        if op == "dispatch":
            return lambda i: form(i.x, i.stock)
        return lambda i: form(i.y, i.plan, i.weights)

    def difference(step: Step, our: Step) -> Step:
        return lambda i: stock.largest_difference(step(i), our(i))

    measured = []
    for op, name in [(each, name) for each in forms for name in forms[each]]:
        step = stock_step(op, forms[op][name])
        worst = largest(bench.on_ranks(difference(step, ours[op]))(inputs[0]))
        assert worst <= (0 if op == "dispatch" else TOLERANCE), f"{name} is off by {worst}"
        measured.append((op, name, bench.us(step, inputs, num_calls)))
    return measured


def measure_ragged(bench: Bench, shape: GroupShape, timeout_s: float) -> list[Row]:
    """The process ends if it takes longer: nothing else stops a program on a GPU."""
    faulthandler.dump_traceback_later(timeout_s, exit=True)
    inputs, _, _ = make_inputs(bench, shape, with_stock=True)
    measured = measure_stock(bench, {"dispatch": stock.RAGGED}, inputs, num_calls=2)
    faulthandler.cancel_dump_traceback_later()
    return [make_row(shape, *each, {}) for each in measured]


def forms_of(shape: GroupShape) -> list[str]:
    """Stock JAX at the standard point with any T; a loop where a step is short."""
    is_standard = shape == GroupShape(R=shape.R, T=shape.T)
    return ["stock"] * is_standard + ["loop"] * (shape.T == 128)


def shrunk(shape: GroupShape) -> GroupShape:
    """For a dry run."""
    most = {"T": 6, "K": 2, "A": 4, "H": 32}
    small = {letter: min(getattr(shape, letter), size) for letter, size in most.items()}
    return dataclasses.replace(shape, **small, E=4 * shape.R)


# Results.


def show(rows: list[Row]) -> None:
    """The fastest stock form beside each of ours."""
    letters = ("T", "H", "K", "A", "tail", "C", "num_sms", "routing")
    table = Table(*letters[:-2], "SMs", "routing", "op", "us", "P us", "M us", "us/M", "stock us")
    loop = "in a loop"
    for r in [r for r in rows if r["form"] in ("", loop)]:
        point = {key: r[key] for key in (*letters, "op")}
        others = [
            o["us"] for o in rows if o["form"] not in ("", loop) and point.items() <= o.items()
        ]
        cells = [r["us"], r.get("P_us"), r.get("M_us")]
        ratio = f"{r['ratio']:.2f}" if "ratio" in r else "-"
        table.add_row(
            *["-" if r[letter] is None else str(r[letter]) for letter in letters],
            f"{r['op']} {r['form']}".strip(),
            *["-" if us is None else f"{us:.1f}" for us in cells],
            ratio,
            f"{min(others):.1f}" if others and not r["form"] else "-",
        )
    Console(width=140).print(table)


def plot(rows: list[Row], path: pathlib.Path) -> None:
    """Time against T at the standard point, with P and M."""
    import matplotlib as mpl  # not needed with --quick

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    standard = {key: value for key, value in vars(GroupShape(R=rows[0]["R"])).items() if key != "T"}
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for color, op in enumerate(LIMITED):
        wanted = {**standard, "op": op, "form": ""}
        points = sorted((r for r in rows if wanted.items() <= r.items()), key=lambda r: r["T"])
        for key, style in (("us", "o-"), ("M_us", ":")):
            known = [r for r in points if key in r]
            name = op if key == "us" else f"M of {op}"
            tokens, us = [r["T"] for r in known], [r[key] for r in known]
            axes.loglog(tokens, us, style, color=f"C{color}", label=name)
    known = [r for r in points if "P_us" in r]
    axes.loglog([r["T"] for r in known], [r["P_us"] for r in known], "k--", label="P")
    axes.set(xlabel="tokens T a rank", ylabel="µs", title="H = 7168, K = 8, A = 128, bf16")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def join_processes() -> None:
    if address := os.environ.get("JAX_MOE_EP_COORDINATOR"):
        process = int(os.environ["JAX_MOE_EP_PROCESS"])
        processes = int(os.environ["JAX_MOE_EP_NUM_PROCESSES"])
        jax.distributed.initialize(address, processes, process, local_device_ids=[process])


def main(
    out: Annotated[pathlib.Path, typer.Option(help="Folder of the JSON and the plot.")] = RESULTS,
    quick: Annotated[bool, typer.Option(help="The standard point and T = 128 only.")] = False,
    wall: Annotated[
        bool, typer.Option(help="A dry run on any devices: tiny shapes, reference, host's clock.")
    ] = False,
    ranks: Annotated[int | None, typer.Option(help="GPUs to use; all, if left out.")] = None,
    peer_gbps: Annotated[
        float | None, typer.Option(help="GB/s each way of a peer copy, for P, not measured then.")
    ] = None,
    ragged: Annotated[
        float | None,
        typer.Option(help="Measure ragged_all_to_all too, last, for at most so many seconds."),
    ] = None,
) -> None:
    join_processes()
    mesh = Mesh(np.array(jax.devices()[:ranks]), (stock.AXIS,))
    dry = {"implementation": "reference", "times": wall_times_us, "most_calls": 2}
    bench = Bench(mesh, peer_gbps=peer_gbps, **(dry if wall else {}))
    name = "ep" if jax.process_count() == 1 else "ep-processes"
    is_first = jax.process_index() == 0
    rate = copy_rate(bench, 1e6 if wall else 1e9)
    points = (quick_points if quick else group_sweep)(mesh.size)
    rows: list[Row] = []

    def record(new_rows: list[Row]) -> None:
        """After every point: whatever ends the process, what is measured stays."""
        rows.extend(new_rows)
        if is_first:
            flags = os.environ.get("XLA_FLAGS", "")
            save(name, rows, out, limits=describe_limits(bench, rate), xla_flags=flags)

    at = shrunk if wall else lambda shape: shape
    for shape in track(points, "measuring", disable=not is_first):
        record(measure(bench, at(shape), rate, forms_of(shape)))
    if is_first:
        show(rows)
        print(out / f"{name}.json")
        if not quick and not wall:
            plot(rows, out / f"{name}.png")
    if ragged is not None:
        record(measure_ragged(bench, at(points[0]), ragged))


if __name__ == "__main__":
    typer.run(main)
