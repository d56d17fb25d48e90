"""The points of the benchmarks, and the bytes that each op must move there."""

import dataclasses
import math

import numpy as np
import pytest
from benchmarking import TINY, routing_by_hand, tiny_bench

from benchmarks import group, shapes
from benchmarks.shapes import GroupShape, Shape

# Bytes.


def test_bytes_by_hand():
    """16 bytes a row; C = 2 * up(4, 3) = 12, two experts that all four tokens name.

    Both of rank 0's tokens have a row there and one crosses to rank 1, and the other way round. So
    dispatch reads 2 + 1 tokens and writes 12 rows; combine reads 4 rows, has one partial written
    and read, and writes 2 tokens; its backward does 2 + 1 + 4 + 12.
    """
    shape, ids = routing_by_hand()
    assert shape.num_rows == 12
    for op, rows in {"dispatch": 15, "combine": 8, "combine_backward": 19}.items():
        moved = shapes.traffic(op, shape, ids)
        assert moved.local.tolist() == [16 * rows] * 2, op
        assert moved.remote.tolist() == [[0, 16], [16, 0]], op
        assert moved.routed.tolist() == [[32, 16], [16, 32]], op
    undefined = dataclasses.replace(shape, tail="undefined")  # writes the 6 aligned rows
    assert shapes.traffic("dispatch", undefined, ids).local.tolist() == [16 * 9] * 2


@pytest.mark.parametrize("routing", ["uniform", "skewed", "one_rank"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("tail", ["zero", "undefined"])
def test_bytes_are_those_of_loops(routing, num_ranks, tail):
    shape = GroupShape(9, 8, 3, 4, tail, 16, num_ranks, routing, "worst")
    ids = shape.ids(np.random.default_rng(1))
    read, aligned = np.zeros(num_ranks, int), np.zeros(num_ranks, int)
    crossing = np.zeros((num_ranks, num_ranks), int)
    own = np.zeros(num_ranks, int)
    for expert in range(16):
        rows = sum(expert in token for token in ids.tolist())
        read[expert // shape.num_local] += rows
        while rows % 4:
            rows += 1
        aligned[expert // shape.num_local] += rows
    for t, token in enumerate(ids.tolist()):
        for rank in {expert // shape.num_local for expert in token}:
            if rank == t // 9:
                own[rank] += 1
            else:
                crossing[t // 9, rank] += 1
    written = shape.num_rows if tail == "zero" else aligned
    sent = crossing.sum(1)
    expected = {
        "dispatch": own + sent + written,
        "combine": read + 2 * sent + 9,
        "combine_backward": own + sent + read + written,
    }
    for op, rows in expected.items():
        moved = shapes.traffic(op, shape, ids)
        np.testing.assert_array_equal(moved.local, 16 * rows)
        np.testing.assert_array_equal(
            moved.remote, 16 * (crossing.T if op == "combine" else crossing)
        )


def test_bytes_of_the_standard_point():
    """C = 42,624 rows of 14,336 bytes; the megabytes of a rank that the limits are known by."""
    shape = GroupShape()
    assert shape.num_rows == 42_624
    ids = shape.ids(np.random.default_rng(0))
    for op, megabytes in {"dispatch": 728, "combine": 646, "combine_backward": 1200}.items():
        moved = shapes.traffic(op, shape, ids)
        np.testing.assert_allclose(moved.local / 1e6, megabytes, rtol=5e-3)
        np.testing.assert_allclose(shapes.most_of_a_rank(moved.remote) / 1e6, 58.5, rtol=5e-3)


@pytest.mark.parametrize(("num_ranks", "megabytes"), [(2, 58.5), (4, 159.2), (8, 272.0)])
def test_bytes_that_a_rank_sends_at_the_standard_point(num_ranks, megabytes):
    """A token has none of its K = 8 experts among the 256 / R of a rank with the probability
    C(256 - 256 / R, 8) / C(256, 8), so it goes to R - 1 other ranks with what is left of 1."""
    shape = GroupShape(R=num_ranks)
    none = math.comb(256 - shape.num_local, 8) / math.comb(256, 8)
    to_a_rank = 4096 * 14_336 * (1 - none) / 1e6
    assert (num_ranks - 1) * to_a_rank == pytest.approx(megabytes, abs=0.1)
    moved = shapes.traffic("dispatch", shape, shape.ids(np.random.default_rng(0)))
    assert moved.routed.shape == (num_ranks, num_ranks)
    np.testing.assert_allclose(moved.routed / 1e6, to_a_rank, rtol=3e-2)
    most = shapes.most_of_a_rank(moved.remote), shapes.most_of_a_rank(moved.routed)
    np.testing.assert_allclose(most, [megabytes * 1e6, num_ranks * to_a_rank * 1e6], rtol=1e-2)


def test_the_most_of_a_rank_is_what_it_sends_or_receives_in_all():
    assert shapes.most_of_a_rank(np.array([[0, 4, 1], [2, 0, 0], [3, 3, 0]])) == 7  # to rank 1
    assert shapes.most_of_a_rank(np.array([[0, 4, 4], [2, 0, 0], [3, 3, 0]])) == 8  # of rank 0
    assert shapes.most_of_a_rank(np.zeros((1, 1), int)) == 0


def test_bytes_of_one_rank_are_as_before():
    """747, 528 and 1217 MB are those of docs/benchmarks.md for T = 4096: all tokens are own."""
    shape = Shape()
    live, aligned = 4096 * 8, 48_000
    assert shapes.bytes_moved("dispatch", shape, live, aligned, 65_280) == 14_336 * (4096 + aligned)
    assert shapes.bytes_moved("combine", shape, live, aligned, 65_280) == 14_336 * (4096 + live)
    both = shapes.bytes_moved("combine_backward", shape, live, aligned, 65_280)
    assert both == 14_336 * (4096 + live + aligned)


# Shapes.


def test_sweep_changes_one_letter_at_a_time():
    """But for the tail and a batch of 128 of the quick points, and for capacities that fit."""
    points = shapes.group_sweep(2)
    assert len(set(points)) == len(points)
    quick = points[:4]
    assert quick == shapes.quick_points(2)
    standard = GroupShape(4096, 7168, 8, 128, "zero", 256, 2, "uniform", "typical", None)
    assert points[0] == standard
    values = {name: set() for name in vars(standard)}
    for point in points[4:]:
        changed = [name for name in values if getattr(point, name) != getattr(standard, name)]
        assert len(changed) == 1 or changed == ["routing", "capacity"]
    for point in points:
        for name in values:
            values[name].add(getattr(point, name))
    assert values["T"] == {16, 128, 1024, 4096, 8192, 16384}
    assert values["K"] == {1, 2, 8}
    assert values["H"] == {2048, 4096, 7168}
    assert values["A"] == {1, 16, 128}
    assert values["tail"] == {"zero", "undefined"}
    assert values["num_sms"] == {None, 24, 32, 64, 96}
    assert values["routing"] == {"uniform", "skewed", "one_rank"}
    assert values["capacity"] == {"typical", "worst"}


@pytest.mark.parametrize(("num_ranks", "longest"), [(2, 4096), (4, 1024), (8, 1024)])
def test_every_short_point_of_the_sweep_drops_nothing(num_ranks, longest):
    """And its rows fit in the memory of a GPU: 12 GB are read and 12 GB written at the most."""
    for point in shapes.group_sweep(num_ranks):
        assert num_ranks == point.R
        assert 2 * point.num_rows * point.row_bytes < group.MOST_BUFFER_BYTES
        if longest >= point.T:
            ids = point.ids(np.random.default_rng(0))
            assert all(len(set(token)) == point.K for token in ids[:100].tolist())
            assert shapes.load(point, ids).aligned_rows.max() <= point.num_rows


class Unlucky:
    """Scores of which the first `times` send every token to expert 0."""

    def __init__(self, times):
        self.times, self.good = times, np.random.default_rng(0)

    def random(self, size, dtype):
        self.times -= 1
        return (
            np.tile(np.arange(size[1]), (size[0], 1)) if self.times >= 0 else self.good.random(size)
        )


def test_a_routing_that_does_not_fit_is_drawn_again():
    """32 tokens of 2 ranks with K = 1 need 32 rows if all go to expert 0, and 24 are there."""
    shape = GroupShape(T=16, K=1, A=4, E=4)
    assert shape.num_rows == 24
    assert len(set(shape.ids(Unlucky(3)).ravel().tolist())) == 4
    with pytest.raises(ValueError, match=r"100 routings exceed the 24 rows of .*capacity='worst'"):
        shape.ids(Unlucky(1000))


def test_routings():
    random = np.random.default_rng(0)
    one = dataclasses.replace(TINY, routing="one_rank").ids(random)
    assert one.max() < TINY.num_local
    skewed = GroupShape(T=500, K=2, E=16, routing="skewed", capacity="worst")
    uniform = dataclasses.replace(skewed, routing="uniform")
    loads = [np.sort(np.bincount(s.ids(random).ravel(), minlength=16)) for s in (skewed, uniform)]
    assert loads[0][-1] > 3 * loads[0][8]
    assert loads[1][-1] < 1.5 * loads[1][8]


def test_options_reach_the_kernels():
    bench = dataclasses.replace(tiny_bench(), implementation="cuda")
    config = bench.config(dataclasses.replace(TINY, num_sms=24, tail="undefined", A=16))
    assert (config.num_sms, config.tail, config.alignment) == (24, "undefined", 16)
    assert (config.implementation, config.timeout_s) == ("cuda", group.TIMEOUT_S)
    assert tiny_bench().config(TINY).implementation == "reference"
