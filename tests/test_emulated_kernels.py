"""The kernels of a group themselves, for 2 to 8 ranks, on the host, against the loops."""

import ctypes

import ml_dtypes
import numpy as np
import oracle
import pytest
from emulation import Way, job_of_gather, make_experts, repeat, row_shape, ruined, run
from helpers import Case, assert_bitwise_equal, make_bits, make_floats, make_ids, one_process
from native_build import needs_compiler

pytestmark = [needs_compiler, one_process]

CASES = {
    "two_ranks": Case(T=6, K=2, E=8, R=2, A=4, H=64),
    "four_ranks": Case(T=5, K=3, E=8, R=4, A=2, H=32),
    "eight_ranks": Case(T=3, K=4, E=16, R=8, H=16),
    "one_expert_a_rank": Case(T=3, K=3, E=2, R=2, A=8, H=16),
    "drops": Case(T=8, K=3, E=8, R=2, A=4, H=16, capacity=20),
    "more_k_than_at_once": Case(T=2, K=11, E=16, R=2, H=16),
    "more_k_than_lanes": Case(T=2, K=40, E=64, R=2, H=16),  # the vector path of combine serves it
    "several_tiles": Case(T=5, K=3, E=8, R=2, A=4, H=1300),
    "three_parts": Case(T=3, K=3, E=8, R=2, A=4, H=3000),  # of a row, 4 KB each
    "parts_of_8_kb": Case(T=24, K=6, E=8, R=2, A=4, H=2100),  # two, and two chunks of dweights
    "whole_tiles": Case(T=3, K=3, E=8, R=2, A=4, H=1024),
    "several_chunks": Case(T=20, K=2, E=8, R=2, A=4, H=256),  # of 16 KB, to stage
    "chunks_of_few_weights": Case(T=50, K=3, E=8, R=2, A=4, H=16),  # two a rank
    "many_weights": Case(T=60, K=3, E=8, R=2, A=4, H=16),
    "many_weights_of_four": Case(T=30, K=3, E=8, R=4, A=2, H=16),
    "undefined_tail": Case(T=6, K=2, E=6, R=2, A=4, H=16, empty_groups="block", tail="undefined"),
}
# The vector path for some: it has no tiles.
PATHS = [(name, True) for name in CASES]
PATHS += [(name, False) for name in ("two_ranks", "four_ranks", "eight_ranks", "several_tiles")]
PATHS += [("three_parts", False), ("parts_of_8_kb", False)]
each_path = pytest.mark.parametrize(("name", "has_bulk_copy"), PATHS)
each_way = pytest.mark.parametrize("reading", ["in_place", "staged", "mixed"])


def defined(case, plan, rows):
    """Rows without an undefined tail, of all ranks."""
    ends = plan["group_sizes"].sum(1) if case.tail == "undefined" else [None] * case.R
    return np.concatenate([rows[rank, :end] for rank, end in enumerate(ends)])


DISPATCH = [(*path, reading) for path in PATHS for reading in ("in_place", "staged")]
DISPATCH += [(name, True, "mixed") for name in ("four_ranks", "several_tiles", "several_chunks")]
DISPATCH += [("four_ranks", False, "mixed")]


@pytest.mark.parametrize(("name", "has_bulk_copy", "reading"), DISPATCH)
def test_dispatch(library, tmp_path, name, has_bulk_copy, reading):
    """Any bits arrive in their rows; padding and a zero tail are zero. Four calls pass epochs."""
    case, maker = CASES[name], "masked" if name == "two_ranks" else "uniform"
    ids, x = make_ids(maker, case), make_bits(case.R, case.T, case.H, dtype=np.uint32)
    way = Way(reading, has_bulk_copy, repeats=4, late=0)
    out = ruined(*row_shape(case), dtype=np.uint32)
    plan = oracle.plan(case, ids)
    for call in run(library, tmp_path, case, "dispatch", way, ids=ids, x=x, out=out):
        want = oracle.dispatch(case, call["x"], plan["slots"])
        assert_bitwise_equal(defined(case, plan, call["out"]), defined(case, plan, want))


@each_way
def test_a_late_reader_finds_the_tokens(library, tmp_path, reading):
    """All rows are on the last rank, which is late: the others need nothing of anybody, but may not
    give their tokens' memory back, or stage those of two calls later, before it has read them."""
    case = CASES["four_ranks"]
    ids, x = make_ids("one_rank", case), make_bits(case.R, case.T, case.H, dtype=np.uint32)
    way = Way(reading, repeats=4, late=case.R - 1, late_s=1.5)
    out = ruined(*row_shape(case), dtype=np.uint32)
    for call in run(library, tmp_path, case, "dispatch", way, ids=ids, x=x, out=out):
        want = oracle.dispatch(case, call["x"], oracle.plan(case, ids)["slots"])
        assert (want[-1] != 0).any()
        assert_bitwise_equal(call["out"], want)


@each_way
def test_every_rank_waits_for_a_slow_reader(library, tmp_path, reading):
    """As above, with a reader that is late in each call: all others are ahead of it, the rank
    before it too."""
    case = CASES["four_ranks"]
    ids, x = make_ids("one_rank", case), make_bits(case.R, case.T, case.H, dtype=np.uint32)
    way = Way(reading, repeats=3, faults=((case.R - 1, (800_000_000, 0, 0, 0)),))
    out = ruined(*row_shape(case), dtype=np.uint32)
    for call in run(library, tmp_path, case, "dispatch", way, ids=ids, x=x, out=out):
        want = oracle.dispatch(case, call["x"], oracle.plan(case, ids)["slots"])
        assert_bitwise_equal(call["out"], want)


@each_path
@pytest.mark.parametrize("is_weighted", [True, False], ids=["weighted", "plain"])
def test_combine(library, tmp_path, name, has_bulk_copy, is_weighted):
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


def test_a_few_weight_has_come_when_both_of_its_words_have(library):
    """Of two calls before, and of a call with another hash, the tags differ."""
    words = ctypes.c_uint64 * 2
    read = ctypes.CDLL(library).read_weight
    got = ctypes.c_float()

    def word(bits, tag):
        return (tag << 16 | bits) & 2**64 - 1

    def has_come(low, high, tag, epoch):
        return bool(
            read(words(low, high), ctypes.c_uint64(tag), ctypes.c_uint64(epoch), ctypes.byref(got))
        )

    hash_, epoch = 2**63 + 12345, 9
    bits = int(np.float32(-3.7).view(np.uint32))
    halves = bits & 0xFFFF, bits >> 16
    now = [word(half, hash_ + epoch) for half in halves]
    assert has_come(*now, hash_, epoch)
    assert got.value == np.float32(-3.7)
    for other in (hash_ + epoch - 2, hash_ + epoch + 2**40, 0):
        old = [word(half, other) for half in halves]
        assert not has_come(now[0], old[1], hash_, epoch)
        assert not has_come(old[0], now[1], hash_, epoch)
        assert not has_come(*old, hash_, epoch)


BACKWARD = [(*path, "staged") for path in PATHS if path[0] != "one_expert_a_rank"]
BACKWARD += [
    (name, True, reading)
    for name in ("two_ranks", "four_ranks", "more_k_than_at_once")
    for reading in ("in_place", "mixed")
]


@pytest.mark.parametrize(("name", "has_bulk_copy", "reading"), BACKWARD)
def test_combine_backward(library, tmp_path, name, has_bulk_copy, reading):
    """dy exactly, zeros in the padding; dw within 2^-24 of the magnitudes for each addition."""
    case = CASES[name]
    ids = make_ids("masked" if name == "two_ranks" else "uniform", case)
    plan = oracle.plan(case, ids)
    y, weights = make_experts(case, plan, np.float32)
    dout = make_floats(case.R, case.T, case.H, seed=3)
    way = Way(reading, has_bulk_copy, repeats=2, late=0)
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
    job = job_of_gather(R, T, K, row_bytes, **arrays)
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
