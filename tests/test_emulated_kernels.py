"""The kernels of a group themselves, for 2 to 8 ranks, as threads of the host: every step of the
protocol and all of the arithmetic, against the loops; and the plan by one block, as any rank. Bulk
copies are done at once and memory is not weak: missing fences show on GPUs only.

The sources are those of ffi/, with the files of native/emulated/ in place of those that hold PTX
and with launches as calls. Needs g++ and CUDA's headers.
"""

import ctypes
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
import pytest
from helpers import CASES as PLAN_CASES
from helpers import (
    MAKERS,
    Case,
    assert_bitwise_equal,
    make_bits,
    make_floats,
    make_ids,
    one_process,
)
from native_build import FFI, NATIVE, build, needs_compiler

pytestmark = [needs_compiler, one_process]

EMULATED = NATIVE / "emulated"
KERNELS = ("dispatch", "combine_group", "combine_backward_group", "gather_group", "plan_small")
OPS = {"dispatch": 1, "combine": 2, "combine_backward": 3, "gather": 4}
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
# flags and pieces, so that a few tokens have pieces of several tokens and of several tiles.
ON_HOST = {
    "#if __CUDA_ARCH__ >= 900": "#if 1",
    "extern __shared__ __align__(128) char tiles[]": "static char tiles[1 << 18]",
    "kMaxPieces = 16 * 1024": "kMaxPieces = 8",
    "kEnough = 8192": "kEnough = 8",
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


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    flags = ["-O1", "-fPIC", "-ffp-contract=off", "-include", "device.h", f"-I{folder}"]
    return build(folder, *prepare(folder), flags=flags, link=["-shared"])


@dataclasses.dataclass(frozen=True)
class Way:
    """How a test runs the ranks."""

    is_one_process: bool = True
    has_bulk_copy: bool = True
    repeats: int = 1
    late: int | None = None  # the rank that is late first; then those before it
    late_s: float = 0.05
    num_sms: int = 1  # beyond one the blocks claim; a single one of them runs here, and does all


CHANGING = {"x", "dout", "weights"}
RESULTS = {"out", "dweights"}


def earlier(name, array, distance):
    """What an input was some calls before: whatever is left of it must not be found again."""
    if array.dtype.kind in "iu":
        return array + array.dtype.type(distance)
    if name == "weights":
        return array * np.float32(1 + distance)  # NaN stays at its places
    return np.roll(array, distance, axis=-1)


def run(library, folder, case, op, way, **arrays):
    """For every call of an op that moves rows its changing inputs and its results, of all ranks."""
    plan = oracle.plan(case, arrays.pop("ids"))
    dtype = arrays["x"].dtype
    rows = arrays["out"] if op != "combine" else arrays["x"]
    job = {
        "op": OPS[op],
        "num_ranks": case.R,
        "is_one_process": int(way.is_one_process),
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
    return repeat(library, folder, job, way, **arrays, **{name: plan[name] for name in names})


def repeat(library, folder, job, way, **arrays):
    """The calls of a job."""
    job |= {
        "num_sms": way.num_sms,
        "timeout_ns": 20_000_000_000,
        "options": 7,
        "repeats": way.repeats,
        "late": way.late,
        "late_s": way.late_s,
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
    assert not results.pop("failures").any()
    assert not results.pop("launches").any(), "counters must be zero between launches"
    arrays |= {name: results[name].view(arrays[name].dtype) for name in results}
    changed = (CHANGING | RESULTS) & arrays.keys()
    return [{name: arrays[name][:, i] for name in changed} for i in range(way.repeats)]


CASES = {
    "two_ranks": Case(T=6, K=2, E=8, R=2, A=4, H=64),
    "four_ranks": Case(T=5, K=3, E=8, R=4, A=2, H=32),
    "eight_ranks": Case(T=3, K=4, E=16, R=8, H=16),
    "one_expert_a_rank": Case(T=3, K=3, E=2, R=2, A=8, H=16),
    "drops": Case(T=8, K=3, E=8, R=2, A=4, H=16, capacity=20),
    "more_k_than_at_once": Case(T=2, K=11, E=16, R=2, H=16),
    "several_tiles": Case(T=5, K=3, E=8, R=2, A=4, H=1300),
    "several_chunks": Case(T=20, K=2, E=8, R=2, A=4, H=256),  # of 16 KB, to stage
    "undefined_tail": Case(T=6, K=2, E=6, R=2, A=4, H=16, empty_groups="block", tail="undefined"),
}
each_case = pytest.mark.parametrize("name", CASES)
each_path = pytest.mark.parametrize("has_bulk_copy", [True, False], ids=["bulk", "vector"])
each_way = pytest.mark.parametrize("is_one_process", [True, False], ids=["one", "several"])


def ruined(*shape, dtype=np.float32):
    """What a result holds before it is written."""
    return np.full(shape, -77, np.int8).view(np.uint8).astype(dtype)


def row_shape(case):
    return case.R, oracle.capacity(case), case.H


def defined(case, plan, rows):
    """Rows without an undefined tail, of all ranks."""
    ends = plan["group_sizes"].sum(1) if case.tail == "undefined" else [None] * case.R
    return np.concatenate([rows[rank, :end] for rank, end in enumerate(ends)])


@each_path
@each_way
@each_case
def test_dispatch(library, tmp_path, name, is_one_process, has_bulk_copy):
    """Any bits arrive in their rows; padding and a zero tail are zero. Four calls pass epochs."""
    case, maker = CASES[name], "masked" if name == "two_ranks" else "uniform"
    ids, x = make_ids(maker, case), make_bits(case.R, case.T, case.H, dtype=np.uint32)
    way = Way(is_one_process, has_bulk_copy, repeats=4, late=0)
    out = ruined(*row_shape(case), dtype=np.uint32)
    plan = oracle.plan(case, ids)
    for call in run(library, tmp_path, case, "dispatch", way, ids=ids, x=x, out=out):
        want = oracle.dispatch(case, call["x"], plan["slots"])
        assert_bitwise_equal(defined(case, plan, call["out"]), defined(case, plan, want))


@each_way
def test_a_late_reader_finds_the_tokens(library, tmp_path, is_one_process):
    """All rows are on the last rank, which is late: the others need nothing of anybody, but may not
    give their tokens' memory back, or stage those of two calls later, before it has read them."""
    case = CASES["four_ranks"]
    ids, x = make_ids("one_rank", case), make_bits(case.R, case.T, case.H, dtype=np.uint32)
    way = Way(is_one_process, repeats=4, late=case.R - 1, late_s=1.5)
    out = ruined(*row_shape(case), dtype=np.uint32)
    for call in run(library, tmp_path, case, "dispatch", way, ids=ids, x=x, out=out):
        want = oracle.dispatch(case, call["x"], oracle.plan(case, ids)["slots"])
        assert (want[-1] != 0).any()
        assert_bitwise_equal(call["out"], want)


def make_experts(case, plan, dtype):
    """Rows with NaN in padding and tail, weights with NaN at places without a row."""
    y = make_floats(*row_shape(case), dtype=dtype)
    y[oracle.row_sources(case, plan["slots"]) < 0] = np.nan
    weights = np.where(
        plan["owners"] < 0, np.float32(np.nan), make_floats(case.R, case.T, case.K, seed=1)
    )
    return y, weights.astype(np.float32)


@each_path
@pytest.mark.parametrize("is_weighted", [True, False], ids=["weighted", "plain"])
@each_case
def test_combine(library, tmp_path, name, is_weighted, has_bulk_copy):
    """The order and roundings of the loops. Five calls pass both parities of the landing areas."""
    case = CASES[name]
    dtype = {"two_ranks": ml_dtypes.bfloat16, "drops": np.float16}.get(name, np.float32)
    ids = make_ids("masked" if name == "two_ranks" else "uniform", case)
    plan = oracle.plan(case, ids)
    y, weights = make_experts(case, plan, dtype)
    arrays = {"weights": weights} if is_weighted else {}
    way = Way(has_bulk_copy=has_bulk_copy, repeats=5, late=case.R - 1)
    out = ruined(case.R, case.T, case.H, dtype=dtype)
    for call in run(library, tmp_path, case, "combine", way, ids=ids, x=y, out=out, **arrays):
        want = oracle.combine(case, call["x"], plan["slots"], plan["owners"], call.get("weights"))
        assert_bitwise_equal(call["out"], want)


BACKWARD = [(name, False) for name in CASES if name != "one_expert_a_rank"]
BACKWARD += [(name, True) for name in ("two_ranks", "four_ranks", "more_k_than_at_once")]


@each_path
@pytest.mark.parametrize(("name", "is_one_process"), BACKWARD)
def test_combine_backward(library, tmp_path, name, is_one_process, has_bulk_copy):
    """dy exactly, zeros in the padding; dw within 2^-24 of the magnitudes for each addition."""
    case = CASES[name]
    ids = make_ids("masked" if name == "two_ranks" else "uniform", case)
    plan = oracle.plan(case, ids)
    y, weights = make_experts(case, plan, np.float32)
    dout = make_floats(case.R, case.T, case.H, seed=3)
    way = Way(is_one_process, has_bulk_copy, repeats=2, late=0)
    calls = run(
        library,
        tmp_path,
        case,
        "combine_backward",
        way,
        ids=ids,
        x=y,
        dout=dout,
        weights=weights,
        out=ruined(*row_shape(case)),
        dweights=ruined(*weights.shape),
    )
    slots = plan["slots"]
    for call in calls:
        dy, dw = oracle.combine_backward(case, call["dout"], call["x"], slots, call["weights"])
        dy[oracle.row_sources(case, slots) < 0] = 0
        assert_bitwise_equal(defined(case, plan, call["out"]), defined(case, plan, dy))
        limit = 2.0**-24 * (np.log2(case.H) + 2) * 6 * np.abs(dout).sum(-1).max()
        assert np.abs(call["dweights"] - dw).max() <= limit
        assert (call["dweights"][plan["owners"] < 0] == 0).all()


# (R, T, K, type): what is moved 16, 4 or 1 bytes at once; the last ones are cut into many chunks.
GATHERS = {
    "two_ranks": (2, 8, 2, np.int32),
    "one_number": (2, 1, 1, np.int32),
    "not_16_bytes": (2, 5, 3, np.int32),
    "an_odd_number_of_bytes": (2, 3, 5, np.uint8),
    "four_ranks": (4, 37, 4, np.int32),
    "eight_ranks": (8, 5, 6, np.int32),
    "many_chunks": (2, 300, 128, np.int32),
    "many_odd_chunks": (4, 1501, 3, np.int32),
    "many_of_eight_ranks": (8, 520, 8, np.int32),
}
# By one block alone; and the long ones by blocks that claim.
BLOCKS = [(name, 1) for name in GATHERS] + [(name, 32) for name in GATHERS if "many" in name]


@pytest.mark.parametrize("num_arrays", [1, 2])
@pytest.mark.parametrize(("name", "num_sms"), BLOCKS)
def test_gather(library, tmp_path, name, num_arrays, num_sms):
    """Every rank gets the bits of all in rank order, whoever is late. Five calls pass both parities
    of the parts."""
    R, T, K, dtype = GATHERS[name]
    x = make_bits(R, T, K, dtype=dtype)
    arrays = {"x": x, "out": ruined(R, R * T, K, dtype=dtype)}
    if num_arrays == 2:
        more = make_bits(R, T, K, dtype=dtype, seed=1)
        arrays |= {"weights": more, "dweights": arrays["out"].copy()}
    row_bytes = K * np.dtype(dtype).itemsize * num_arrays
    way = Way(repeats=5, late=R - 1, num_sms=num_sms)
    for call in gathered(library, tmp_path, R, T, K, row_bytes, way, **arrays):
        for given, got in (("x", "out"), ("weights", "dweights"))[:num_arrays]:
            want = np.broadcast_to(call[given].reshape(R * T, K), (R, R * T, K))
            assert_bitwise_equal(call[got], want)


def gathered(library, folder, R, T, K, row_bytes, way, **arrays):
    """For every call of gather its inputs and results, of all ranks."""
    unused = ("type", "num_groups", "alignment", "capacity", "zero_tail")
    job = {
        **dict.fromkeys(unused, 0),
        "op": OPS["gather"],
        "num_ranks": R,
        "is_one_process": 1,
        "has_weights": int("weights" in arrays),
        "num_tokens": T,
        "top_k": K,
        "row_bytes": row_bytes,
    }
    return repeat(library, folder, job, way, **arrays)


def test_gather_of_nothing(library, tmp_path):
    """No bytes: no call, and nobody waits."""
    nothing = np.zeros((2, 0, 3), np.int32)
    gathered(library, tmp_path, 2, 0, 3, 12, Way(repeats=2), x=nothing, out=nothing)


def test_the_example_of_gather(library, tmp_path):
    """The numbers in the comment of gather_group.cu."""
    x = np.array([[[1], [2]], [[3], [4]]], np.int32)
    out = ruined(2, 4, 1, dtype=np.int32)
    (call,) = gathered(library, tmp_path, 2, 2, 1, 4, Way(), x=x, out=out)
    assert call["out"].reshape(2, 4).tolist() == [[1, 2, 3, 4]] * 2


# Plans by one block.
PLANS = {
    **{
        name: case for name, case in PLAN_CASES.items() if case.drop_policy == "position" and case.T
    },
    "three_ranks": Case(T=9, K=2, E=12, R=3, capacity=16),
    "no_row_fits": Case(T=8, K=2, E=4, R=2, A=64, capacity=60),
    "several_rounds_a_warp": Case(T=512, K=8, E=256, R=2, A=16, capacity=1.0),
    "all_experts": Case(T=250, K=4, E=1024, R=1, A=4),
}


def small_plan(library, case, ids, rank):
    """One rank's arrays of the plan; None where one block is not enough."""
    limit = oracle.expert_limit(case) if case.expert_capacity is not None else 2**31 - 1
    is_block = case.empty_groups == "block"
    options = (case.A, oracle.capacity(case), limit, is_block)
    numbers = np.array([case.R, case.E, case.T * case.K, *options], np.int32)
    local = (case.num_local,)
    shapes = ((case.R * case.T, case.K), (case.T, case.K), local, local, local, (case.R, *local))
    results = [ruined(*shape, dtype=np.int32) for shape in (*shapes, (), (), ())]
    arrays = [np.ascontiguousarray(ids), np.array(rank, np.int32), *results]
    pointers = (ctypes.c_void_p * len(arrays))(*[array.ctypes.data for array in arrays])
    status = ctypes.CDLL(library).small_plan(numbers.ctypes.data_as(ctypes.c_void_p), pointers)
    return dict(zip(oracle.LEAVES, results, strict=True)) if status == 0 else None


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", PLANS)
def test_small_plan(library, name, maker):
    """Every array of every rank, against the loops."""
    case = PLANS[name]
    ids = make_ids(maker, case)
    expected = oracle.plan(case, ids)
    for rank in range(case.R):
        for leaf, got in small_plan(library, case, ids, rank).items():
            assert_bitwise_equal(got, expected[leaf][rank], leaf)


@pytest.mark.parametrize(
    ("case", "is_small"),
    [
        (Case(T=512, K=8, E=256, R=2), True),  # 16 warps of 8 * 32 a rank
        (Case(T=513, K=8, E=256, R=2), False),
        (Case(T=64, K=8, E=256, R=16), True),  # 2 warps a rank
        (Case(T=64, K=8, E=1024, R=8), False),  # 8 warps have counters: 1 a rank
        (Case(T=32, K=8, E=1024, R=8), True),
        (Case(T=1, K=1, E=1024, R=16), False),
        (Case(T=1, K=1, E=2048, R=2), False),
    ],
)
def test_which_plans_are_small(library, case, is_small):
    ids = make_ids("uniform", case)
    assert (small_plan(library, case, ids, 0) is not None) == is_small
