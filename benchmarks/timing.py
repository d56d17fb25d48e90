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

RESULTS = pathlib.Path(__file__).parent / "results"
NUM_WARMUPS = 5
NUM_REPEATS = 30
EXECUTION_GAP_NS = 2e6  # the host sleeps longer than this between two executions


def time_us(step: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> float:
    """Median microseconds of device time of one call of `step`.

    One program calls the step once for every tuple of inputs, so that with enough tuples nothing
    is read from L2. Its device time runs from the start of its first kernel or copy to the end of
    its last, gaps between kernels included; XLA may capture the calls as a CUDA graph.
    """
    program = jax.jit(lambda inputs: [step(*args) for args in inputs])
    return statistics.median(program_times_us(program, list(inputs))) / len(inputs)


def program_times_us(program: Callable[..., Any], *args: Any) -> list[float]:
    """Microseconds of device time of each of NUM_REPEATS executions; with several GPUs, the
    slowest one's."""
    for _ in range(NUM_WARMUPS):
        jax.block_until_ready(program(*args))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(NUM_REPEATS):
                jax.block_until_ready(program(*args))
                time.sleep(2 * EXECUTION_GAP_NS * 1e-9)
        (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(trace)).planes
        by_device = [_execution_spans(p) for p in planes if p.name.startswith("/device:GPU")]
    if not by_device or any(len(spans) != NUM_REPEATS for spans in by_device):
        found = [len(spans) for spans in by_device]
        raise RuntimeError(f"expected {NUM_REPEATS} executions on every GPU, the trace has {found}")
    return [max(spans) * 1e-3 for spans in zip(*by_device, strict=True)]


def _execution_spans(plane: Any) -> list[float]:
    """Nanoseconds from first start to last end of each run of events without a long gap."""
    events = sorted(
        (event.start_ns, event.start_ns + event.duration_ns)
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    )
    spans: list[list[float]] = []
    for start, end in events:
        if not spans or start - spans[-1][1] > EXECUTION_GAP_NS:
            spans.append([start, end])
        spans[-1][1] = max(spans[-1][1], end)
    return [end - start for start, end in spans]


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


def save(name: str, rows: list[dict[str, Any]], folder: pathlib.Path = RESULTS) -> pathlib.Path:
    """Writes rows with their environment to folder/name.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**environment(), "rows": rows}, indent=1) + "\n")
    return path
