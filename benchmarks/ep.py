"""plan, dispatch, combine and their gradients between the GPUs of one host, against the limits of
links and memory and against stock JAX.

One process with all GPUs, or one process a GPU, started with the environment variables
JAX_MOE_EP_COORDINATOR, JAX_MOE_EP_PROCESS and JAX_MOE_EP_NUM_PROCESSES. XLA runs nothing as a CUDA
graph while the profiler looks on (but with xla_enable_command_buffers_during_profiling): gaps
between kernels are those of launches by the host. Loops are timed by the host's clock instead, as
XLA runs them by default and captured.

The results of two GPUs are ep.json, those of R others ep-R.json, with "-processes" of one process
a GPU and "-quick" of the standard point and T = 128 alone. With several processes P is not
measured: give the P_GBps of a run in one process as --peer-gbps.

--ragged SECONDS adds lax.ragged_all_to_all, by NCCL and by XLA's one-shot kernel, which is its
default. Each program is compiled with its own setting, so one run measures both. They come last
and each result is written at once, because a hang ends the process; then --ragged-only with
--one-shot or --no-one-shot measures one of them, and --ragged-first 2 what comes after two forms.
"""

import dataclasses
import faulthandler
import itertools
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import jax
import typer
from rich.console import Console
from rich.progress import track

import jax_moe_ep as ep
from benchmarks import stock
from benchmarks.group import (
    LOOPS,
    Bench,
    Inputs,
    Program,
    Step,
    XlaOptions,
    largest,
    make_bench,
    make_inputs,
    one_by_one,
    ops,
)
from benchmarks.limits import copy_rate, describe_limits, limits
from benchmarks.report import Row, label, make_row, plot, result_name, show
from benchmarks.shapes import GroupShape, group_sweep, quick_points
from benchmarks.timing import RESULTS, save
from jax_moe_ep import cuda

TOLERANCE = 2.0**-6  # of stock sums in bf16, relative to the largest
ROW_OPS = ("dispatch", "combine_backward", "round_trip")  # those that write rows, and so a tail
ONE_SHOT = "xla_gpu_unsupported_use_ragged_all_to_all_one_shot_kernel"
ALLOW_NCCL = "xla_gpu_allow_ragged_all_to_all_nccl_send_recv_fallback"


def measure(bench: Bench, shape: GroupShape, bytes_per_us: float, forms: Any = ()) -> list[Row]:
    """All ops at one point; forms are "loops" and "stock"."""
    inputs, ids, num_calls = make_inputs(bench, shape, with_stock="stock" in forms)
    limit = limits(bench, shape, ids, bytes_per_us)
    steps = ops(bench.config(shape))
    programs = {
        (op, ""): bench.in_turn(step, inputs, num_calls)
        for op, step in steps.items()
        if is_measured(op, shape)
    }
    if "stock" in forms:
        check_gradients(bench, inputs[0])
        programs |= stock_programs(bench, stock.FORMS, inputs, num_calls)
    us = bench.us(programs)
    if "loops" in forms:
        for op, form in itertools.product(("plan_and_dispatch", "combine"), LOOPS):
            us[op, form] = bench.in_loop_us(steps[op], inputs[0], form)
    if bench.implementation == "cuda":
        ep.check()
    return [make_row(shape, *key, us[key], limit.get(key[0], {})) for key in us]


def is_measured(op: str, shape: GroupShape) -> bool:
    """What only reads rows takes the same time with any tail."""
    return op in ROW_OPS if shape.tail == "undefined" else op != "plan_and_dispatch"


def stock_programs(
    bench: Bench,
    forms: stock.Forms,
    inputs: Sequence[Inputs],
    num_calls: int,
    xla: XlaOptions | None = None,
) -> dict[tuple[str, str], Program]:
    """By op and name, those of the forms that give what ours do. The others are named on stderr:
    XLA has more than one ragged_all_to_all that is wrong."""
    steps = {(op, name): stock_step(op, form) for op in forms for name, form in forms[op].items()}
    off = stock_differences(bench, steps, inputs[0], xla)
    programs = {}
    for (op, name), step in steps.items():
        if off[op, name] <= (0 if op == "dispatch" else TOLERANCE):
            programs[op, name] = bench.in_turn(step, inputs, num_calls, xla)
        elif jax.process_index() == 0:
            print(f"{op}, {name} is left out: it is off by {off[op, name]}", file=sys.stderr)
    return programs


def stock_step(op: str, form: Callable[..., Any]) -> Step:
    if op == "dispatch":
        return lambda i: form(i.x, i.stock)
    return lambda i: form(i.y, i.weights, i.stock)


def stock_differences(
    bench: Bench, steps: dict[tuple[str, str], Step], inputs: Inputs, xla: XlaOptions | None
) -> dict[tuple[str, str], float]:
    """How far each step's results are from ours: rows not at all, sums by roundings alone."""
    ours = ops(inputs.plan.config)

    def differences(i: Inputs) -> list[jax.Array]:
        names = dict.fromkeys(op for op, _ in steps)
        outs = one_by_one([(each, i) for each in (*[ours[op] for op in names], *steps.values())])
        expected = dict(zip(names, outs, strict=False))
        actual = outs[len(names) :]
        return [
            stock.largest_difference(out, expected[op])
            for (op, _), out in zip(steps, actual, strict=True)
        ]

    each = bench.on_ranks(differences, xla)(inputs)
    return {key: largest(difference) for key, difference in zip(steps, each, strict=True)}


def check_gradients(bench: Bench, inputs: Inputs) -> None:
    """That our backward passes give what stock JAX's do, but for roundings."""
    ours = ops(inputs.plan.config)

    def differences(i: Inputs) -> dict[str, jax.Array]:
        dispatch, combine = stock.with_gradients(stock.gathered, stock.scattered)

        def of_dispatch(i: Inputs) -> Any:
            return jax.vjp(lambda x: dispatch(x, i.stock), i.x)[1](i.y)[0]

        def of_combine(i: Inputs) -> Any:
            return jax.vjp(lambda y, w: combine(y, w, i.stock), i.y, i.weights)[1](i.x)

        steps = ours["dispatch_backward"], ours["combine_backward"], of_dispatch, of_combine
        dx, (dy, dw), stock_dx, (stock_dy, stock_dw) = one_by_one([(each, i) for each in steps])
        pairs = {"dx": (dx, stock_dx), "dy": (dy, stock_dy), "dweights": (dw, stock_dw)}
        return {name: stock.largest_difference(*pair) for name, pair in pairs.items()}

    for name, difference in bench.on_ranks(differences)(inputs).items():
        worst = largest(difference)
        assert worst <= TOLERANCE, f"{name} is off by {worst}"


def measure_ragged(
    bench: Bench, shape: GroupShape, timeout_s: float, one_shot: Sequence[bool], first: int = 0
) -> Iterator[list[Row]]:
    """A row at a time, from the first on. The process ends if one takes longer: nothing else stops
    a program on a GPU."""
    inputs, _, _ = make_inputs(bench, shape, with_stock=True)
    for is_one_shot, op, name in ragged_forms(one_shot)[first:]:
        faulthandler.dump_traceback_later(timeout_s, exit=True)
        suffix = "one-shot" if is_one_shot else "NCCL"
        named = {op: {f"{name}, {suffix}": stock.RAGGED[op][name]}}
        xla: XlaOptions = {ONE_SHOT: is_one_shot, ALLOW_NCCL: not is_one_shot}
        programs = stock_programs(bench, named, inputs, len(inputs), xla)
        us = bench.us(programs) if programs else {}
        faulthandler.cancel_dump_traceback_later()
        yield [make_row(shape, *key, us[key], {}) for key in us]


def ragged_forms(one_shot: Sequence[bool]) -> list[tuple[bool, str, str]]:
    """By which transport, the op and the name."""
    return [(by, op, name) for by in one_shot for op in stock.RAGGED for name in stock.RAGGED[op]]


def forms_of(shape: GroupShape) -> list[str]:
    """Stock JAX at the standard point with any T; loops where a step is short."""
    is_standard = shape == GroupShape(R=shape.R, T=shape.T)
    return ["stock"] * is_standard + ["loops"] * (shape.T == 128)


def shrunk(shape: GroupShape) -> GroupShape:
    """For a dry run."""
    most = {"T": 6, "K": 2, "A": 4, "H": 32}
    small = {letter: min(getattr(shape, letter), size) for letter, size in most.items()}
    return dataclasses.replace(shape, **small, E=4 * shape.R)


def reads_in_place() -> bool:
    """Whether peers read this process's tokens where XLA has them, so that none are staged."""
    arenas = cuda.extension("benchmarks").arenas() if cuda.has_extension() else []
    return bool(arenas) and all(arena["num_in_place"] > 0 for arena in arenas)


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
        typer.Option(help="Measure ragged_all_to_all too, last, each for at most so many seconds."),
    ] = None,
    ragged_only: Annotated[bool, typer.Option(help="Nothing else; to NAME-ragged.json.")] = False,
    one_shot: Annotated[
        bool | None,
        typer.Option("--one-shot/--no-one-shot", help="One kind of ragged_all_to_all only."),
    ] = None,
    ragged_first: Annotated[
        int, typer.Option(help="The ragged form to begin with: those before it ended the process.")
    ] = 0,
) -> None:
    join_processes()
    if jax.process_count() > 1 and ranks not in (None, jax.device_count()):
        raise typer.BadParameter(
            f"--ranks {ranks} leaves some of the {jax.process_count()} processes without a rank. "
            "Start as many processes as ranks"
        )
    bench = make_bench(ranks, wall, peer_gbps)
    name = result_name("ep", bench.mesh.size)
    name += "-ragged" if ragged_only else "-quick" * quick
    is_first = jax.process_index() == 0
    console = Console(width=180, quiet=not is_first)
    rate = copy_rate(bench, 1e6 if wall else 1e9)
    points = (quick_points if quick else group_sweep)(bench.mesh.size)
    rows: list[Row] = []
    seconds: dict[str, float] = {}

    def record(new_rows: list[Row]) -> None:
        """After every point: whatever ends the process, what is measured stays."""
        rows.extend(new_rows)
        if is_first:
            flags = os.environ.get("XLA_FLAGS", "")
            described = describe_limits(bench, rate, rows)
            more = {"xla_flags": flags, "reads_in_place": reads_in_place(), "seconds": seconds}
            save(name, rows, out, limits=described, **more)

    at = shrunk if wall else lambda shape: shape
    measured = [] if ragged_only else points
    for shape in track(measured, "measuring", console=console, disable=not is_first):
        start = time.monotonic()
        new_rows = measure(bench, at(shape), rate, forms_of(shape))
        seconds[label(shape)] = round(time.monotonic() - start, 1)
        record(new_rows)
        console.print(f"{label(shape)}: {seconds[label(shape)]} s", highlight=False)
    if rows and is_first and not quick and not wall:
        plot(rows, out / f"{name}.png")
    show(rows, console)
    if ragged is not None:
        kinds = [True, False] if one_shot is None else [one_shot]  # NCCL's may end the process
        for new_rows in measure_ragged(bench, at(points[0]), ragged, kinds, ragged_first):
            record(new_rows)
            console.print(*[f"{r['op']}, {r['form']}: {r['us']:.1f} us" for r in new_rows])
    console.print(out / f"{name}.json")


if __name__ == "__main__":
    typer.run(main)
