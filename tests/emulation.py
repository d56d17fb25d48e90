"""Running ffi/'s own kernels as threads of the host, a process a rank: every step of the protocol
and all of the arithmetic. Bulk copies are done at once and memory is not weak: missing fences show
on GPUs only.

The sources are those of ffi/, with the files of native/emulated/ in place of those that hold PTX
and with launches as calls. Needs g++ and CUDA's headers.
"""

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import oracle
from helpers import make_floats
from native_build import FFI, NATIVE, build

EMULATED = NATIVE / "emulated"
KERNELS = (
    "dispatch",
    "combine_group",
    "combine_backward_group",
    "gather_group",
    "plan_small",
    "plan_group",
)
OPS = {"dispatch": 1, "combine": 2, "combine_backward": 3, "gather": 4, "plan": 5}
TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(ml_dtypes.bfloat16): 2}
LAUNCH = re.compile(r"(\w+(?:<[^<>;{}]*>)?)\s*<<<(.*?)>>>\((\w+)\);", re.DOTALL)


def as_call(launch):
    """kernel<<<blocks, threads, ...>>>(params) as a call; only the number of threads counts."""
    kernel, configuration, params = launch.groups()
    depths = np.cumsum([(c in "(<") - (c in ")>") for c in configuration])
    commas = [i for i, c in enumerate(configuration) if c == "," and depths[i] == 0]
    threads = configuration[commas[0] + 1 : commas[1]].strip()
    return f"emulated::Launch({kernel}, {threads}, {params});"


# The bulk path too, which nvcc compiles for new devices alone, with an array for its tiles. Fewer
# flags and pieces, so that a few tokens have pieces of several tokens and of several tiles; fewer
# pulls, so that they have parts of several sizes; fewer few weights, so that some tokens have many.
ON_HOST = {
    "#if __CUDA_ARCH__ >= 900": "#if 1",
    "extern __shared__ __align__(128) char tiles[]": "static char tiles[1 << 18]",
    "kMaxPieces = 16 * 1024": "kMaxPieces = 16",
    "kEnough = 8192": "kEnough = 8",
    "kEnoughPulls = 4096": "kEnoughPulls = 96",
    "kMaxFewWeights = kMaxFewWords / 2": "kMaxFewWeights = 300",
}


def prepare(folder: pathlib.Path) -> list[pathlib.Path]:
    """The sources in the folder, where the host's compiler finds one set of headers."""
    for source in (*FFI.glob("*.h"), *FFI.glob("*.cuh"), *EMULATED.iterdir()):
        if source.is_file():
            shutil.copy(source, folder)
    sources = [folder / "kernels.cc"]
    for name in KERNELS:
        text, count = LAUNCH.subn(as_call, (FFI / f"{name}.cu").read_text())
        assert count >= 1
        sources.append(folder / f"{name}.cc")
        sources[-1].write_text(text)
    changed = set()
    for source in folder.iterdir():
        text = source.read_text()
        changed |= {old for old in ON_HOST if old in text}
        for old, new in ON_HOST.items():
            text = text.replace(old, new)
        source.write_text(text)
    assert changed == ON_HOST.keys()
    return sources


def make_library(folder: pathlib.Path) -> pathlib.Path:
    """All kernels, built in the folder."""
    flags = ["-O1", "-fPIC", "-ffp-contract=off", "-include", "device.h", f"-I{folder}"]
    return build(folder, *prepare(folder), flags=flags, link=["-shared"])


@dataclasses.dataclass(frozen=True)
class Way:
    """How a test runs the ranks."""

    reading: str = (
        "in_place"  # of tokens by peers; "staged"; "mixed": ranks by turns, two calls each
    )
    has_bulk_copy: bool = True
    repeats: int = 1
    late: int | None = None  # the rank that is late first; then those before it
    late_s: float = 0.05
    num_sms: int = 1  # beyond one the blocks claim; a single one of them runs here, and does all
    odd: int | None = None  # the rank whose calls have other options than the others'
    vector: int | None = None  # the rank that has no bulk copies
    timeout_s: float = 20
    faults: tuple[tuple[int, tuple[int, int, int, int]], ...] = ()  # rank, and what set_fault takes


CHANGING = {"x", "dout", "weights"}
RESULTS = {"out", "dweights", "results"}


def earlier(name, array, distance):
    """What an input was some calls before: whatever is left of it must not be found again."""
    if array.dtype.kind in "iu":
        return array + array.dtype.type(distance)
    if name == "weights":
        return array * np.float32(1 + distance)  # NaN stays at its places
    return np.roll(array, distance, axis=-1)


def run(library, folder, case, op, way, **arrays):
    """For every call of an op that moves rows its changing inputs and its results, of all ranks."""
    job, arrays = job_of_rows(case, op, way, **arrays)
    return repeat(library, folder, job, way, **arrays)


def job_of_rows(case, op, way, **arrays):
    """The static side of calls of an op that moves rows, and their arrays."""
    plan = oracle.plan(case, arrays.pop("ids"))
    dtype = arrays["x"].dtype
    rows = arrays["out"] if op != "combine" else arrays["x"]
    job = {
        "op": OPS[op],
        "num_ranks": case.R,
        "type": TYPES.get(dtype, 0),
        "has_weights": int("weights" in arrays),
        "has_bulk_copy": int(way.has_bulk_copy),
        "num_tokens": case.T,
        "top_k": case.K,
        "num_groups": case.num_local,
        "alignment": case.A,
        "capacity": rows.shape[1],
        "zero_tail": int(case.tail == "zero"),
        "row_bytes": rows.shape[2] * dtype.itemsize,
    }
    names = ("slots", "group_counts", "group_sizes", "group_starts", "owners")
    return job, arrays | {name: plan[name] for name in names}


def job_of_gather(R, T, K, row_bytes, **arrays):
    unused = ("type", "num_groups", "alignment", "capacity", "zero_tail")
    return {
        **dict.fromkeys(unused, 0),
        "op": OPS["gather"],
        "num_ranks": R,
        "has_weights": int("weights" in arrays),
        "num_tokens": T,
        "top_k": K,
        "row_bytes": row_bytes,
    }


def repeat(library, folder, job, way, **arrays):
    """The calls of a job, none of which fails."""
    arrays, failures = run_to_the_end(library, folder, job, way, **arrays)
    assert not failures.any()
    changed = (CHANGING | RESULTS) & arrays.keys()
    return [{name: arrays[name][:, i] for name in changed} for i in range(way.repeats)]


def run_to_the_end(library, folder, job, way, **arrays):
    """The arrays after the calls of a job; and [R, 4] kind, phase, rank and peer of failures."""
    job = job | {
        "num_sms": way.num_sms,
        "timeout_ns": int(way.timeout_s * 1e9),
        "options": 7,
        "repeats": way.repeats,
        "late": way.late,
        "late_s": way.late_s,
        "odd": way.odd,
        "odd_options": 8,
        "vector": way.vector,
        "faults": way.faults,
        "reading": way.reading,
    }
    for name in CHANGING & arrays.keys():
        arrays[name] = np.stack(
            [earlier(name, arrays[name], way.repeats - 1 - i) for i in range(way.repeats)], axis=1
        )
    for name in RESULTS & arrays.keys():
        arrays[name] = np.stack([arrays[name]] * way.repeats, axis=1)
    plain = {name: array.view(f"u{array.dtype.itemsize}") for name, array in arrays.items()}
    np.savez(folder / "in.npz", job=json.dumps(job), **plain)
    command = [sys.executable, EMULATED / "ranks.py", library, folder / "in.npz", folder / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = dict(np.load(folder / "out.npz"))
    failures = results.pop("failures")
    assert not results.pop("launches").any(), "counters must be zero between launches"
    return arrays | {n: results[n].view(arrays[n].dtype) for n in results}, failures


def ruined(*shape, dtype=np.float32):
    """What a result holds before it is written."""
    return np.full(shape, -77, np.int8).view(np.uint8).astype(dtype)


def row_shape(case):
    return case.R, oracle.capacity(case), case.H


def make_experts(case, plan, dtype):
    """Rows with NaN in padding and tail, weights with NaN at places without a row."""
    y = make_floats(*row_shape(case), dtype=dtype)
    y[oracle.row_sources(case, plan["slots"]) < 0] = np.nan
    weights = np.where(
        plan["owners"] < 0, np.float32(np.nan), make_floats(case.R, case.T, case.K, seed=1)
    )
    return y, weights.astype(np.float32)
