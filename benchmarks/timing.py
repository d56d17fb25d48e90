"""Device time of jitted steps, and the record a result is kept in."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

RESULTS = pathlib.Path(__file__).parent / "results"
NUM_WARMUPS = 3
NUM_REPEATS = 20
NUM_WALL_REPEATS = 3  # a dry run: no GPU, nothing to report
# The host sleeps longer than this between two executions; longer in another attempt, as one that
# hesitates within an execution, for itself or for XLA, divides it.
EXECUTION_GAPS_NS = (2e6, 2e7)
COMMON_START_NS = 10_000_000  # processes start an execution at multiples of this

Span = list[float]  # start and end of a kernel or copy, in nanoseconds
Call = tuple[Callable[..., Any], tuple[Any, ...]]  # a program and its arguments


def time_us(step: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> float:
    """Median microseconds of device time of one call of `step`.

    One program calls the step once for every tuple of inputs, so that with enough tuples nothing
    is read from L2. Its device time runs from the start of its first kernel or copy to the end of
    its last, gaps between kernels included.
    """
    program = jax.jit(lambda inputs: [step(*args) for args in inputs])
    (times,) = program_times_us([(program, (list(inputs),))])
    return statistics.median(times) / len(inputs)


def longer_us(short: Call, long: Call, num_repeats: int = NUM_REPEATS) -> list[float]:
    """Microseconds that `long` takes more than `short`, by the host's clock and without a profiler,
    under which XLA runs no CUDA graph: what both have alike is not counted. With several processes
    the slowest one's."""
    times: list[list[float]] = [[], []]
    for _ in range(NUM_WARMUPS + num_repeats):
        for (program, args), each in zip((short, long), times, strict=True):
            _await_common_start()
            each.append(_wall_us(program, args))
    slowest = [_largest_of_processes(each[NUM_WARMUPS:]) for each in times]
    return (slowest[1] - slowest[0]).tolist()


def span_ns(events: Sequence[Span]) -> float:
    """From the first start to the last end."""
    return max(end for _, end in events) - min(start for start, _ in events)


def program_times_us(calls: Sequence[Call]) -> list[list[float]]:
    """Microseconds of device time of each of NUM_REPEATS executions of every call; with several
    GPUs, the slowest one's, of all processes. One profile holds them all: to start and end one
    takes longer than most programs."""
    for program, args in calls:
        for _ in range(NUM_WARMUPS):
            jax.block_until_ready(program(*args))
    num_executions = len(calls) * NUM_REPEATS
    num_devices = _num_local_devices([args for _, args in calls])
    found: list[int] = []
    for gap_ns in EXECUTION_GAPS_NS:
        by_device = _profile(calls, gap_ns)
        found = [len(executions) for executions in by_device]
        slowest = [np.nan] * num_executions
        if found == [num_executions] * num_devices:
            slowest = [max(map(span_ns, each)) * 1e-3 for each in zip(*by_device, strict=True)]
        slowest = _largest_of_processes(slowest)
        if not np.isnan(slowest).any():
            return slowest.reshape(len(calls), NUM_REPEATS).tolist()
    raise RuntimeError(
        f"expected {num_executions} executions on each of {num_devices} GPUs, the trace of this "
        f"process has {found}"
    )


def _profile(calls: Sequence[Call], gap_ns: float) -> list[list[list[Span]]]:
    """The executions of each GPU that has any, NUM_REPEATS of every call in turn."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # only the GPUs' events are read
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for program, args in calls:
                for _ in range(NUM_REPEATS):
                    jax.block_until_ready(program(*args))
                    time.sleep(2 * gap_ns * 1e-9)
                    _await_common_start()
        (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(trace)).planes
        by_device = [_executions(p, gap_ns) for p in planes if p.name.startswith("/device:GPU")]
    return [executions for executions in by_device if executions]


def wall_times_us(calls: Sequence[Call]) -> list[list[float]]:
    """The host's time of a few executions: to try a benchmark out without a GPU."""
    return [_wall_times_us(program, args) for program, args in calls]


def _wall_times_us(program: Callable[..., Any], args: tuple[Any, ...]) -> list[float]:
    times = [_wall_us(program, args) for _ in range(1 + NUM_WALL_REPEATS)]
    return _largest_of_processes(times[1:]).tolist()


def _wall_us(program: Callable[..., Any], args: tuple[Any, ...]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(*args))
    return (time.perf_counter() - start) * 1e6


def _await_common_start() -> None:
    """Lets the processes of one host start at the same time, by the clock that they share.

    Otherwise the GPU of the first would wait for the last, and that would be counted.
    """
    if jax.process_count() > 1:
        now = time.monotonic_ns()
        start = (now // COMMON_START_NS + 1) * COMMON_START_NS
        while time.monotonic_ns() < start:
            pass


def _largest_of_processes(times: Sequence[float]) -> np.ndarray:
    if jax.process_count() == 1:
        return np.asarray(times)
    return np.asarray(multihost_utils.process_allgather(np.asarray(times, np.float32))).max(0)


def _num_local_devices(args: Any) -> int:
    """The devices of this process that hold a part of the arguments."""
    shardings = [leaf.sharding for leaf in jax.tree.leaves(args) if isinstance(leaf, jax.Array)]
    return len({device for each in shardings for device in each.addressable_devices})


def _executions(plane: Any, gap_ns: float) -> list[list[Span]]:
    """The events of a GPU, divided where there is a longer gap."""
    events = sorted(
        [event.start_ns, event.start_ns + event.duration_ns]
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    )
    executions: list[list[Span]] = []
    last_end = 0.0
    for start, end in events:
        if not executions or start - last_end > gap_ns:
            executions.append([])
        executions[-1].append([start, end])
        last_end = max(last_end, end)
    return executions


def environment() -> dict[str, Any]:
    """Where and with what a result was measured."""
    versions = {}
    for name in ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax_moe_ep"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return {
        "command": " ".join(["python -m", _module_name(), *_arguments()]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "devices": [device.device_kind for device in jax.devices()],
        "commit": described.stdout.strip() or os.environ.get("COMMIT", "unknown"),
        "versions": versions,
    }


def _module_name() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else pathlib.Path(sys.argv[0]).stem


def _arguments() -> list[str]:
    """The command line but for where results go, which does not change them."""
    arguments = sys.argv[1:]
    if "--out" in arguments:
        place = arguments.index("--out")
        del arguments[place : place + 2]
    return arguments


def save(
    name: str, rows: list[dict[str, Any]], folder: pathlib.Path = RESULTS, **more: Any
) -> pathlib.Path:
    """Writes rows with their environment, and what more belongs to them, to folder/name.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**environment(), **more, "rows": rows}, indent=1) + "\n")
    return path
