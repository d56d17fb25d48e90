"""How the ranks of a group meet, on GPUs made of threads: what they share, what they say when one
of them has a problem, and that nothing of a failed meeting is left. The scenarios are in
native/meetings.cc.

Needs g++ and CUDA's headers, no GPU.
"""

import re
import subprocess

import pytest
from native_build import FFI, NATIVE, build, needs_compiler

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    names = ("arena", "exchange", "meeting", "pool", "mailbox", "failure")
    sources = [FFI / f"{name}.cc" for name in names]
    sources += [NATIVE / f"{name}.cc" for name in ("fake_gpus", "fake_driver", "meetings")]
    built = build(tmp_path_factory.mktemp("meetings"), *sources)

    def run(*args):
        done = subprocess.run(
            [built, *map(str, args)], capture_output=True, text=True, timeout=30, check=True
        )
        return done.stdout

    return run


def texts(output, what):
    """What each rank said after a step, in the order of ranks."""
    return re.findall(rf"^{what}, rank \d+: (.*)$", output, re.MULTILINE)


@pytest.mark.parametrize("num_ranks", [2, 4, 8, 16])
def test_all_ranks_map_the_same_memory(program, num_ranks):
    """One arena a rank, one region a size class, nothing twice."""
    output = program("meets", num_ranks)
    for step in ("meet", "again", "region", "region again", "larger region"):
        assert texts(output, step) == ["fine"] * num_ranks, step
    assert "allocated again: 0" in output
    assert f"allocated for regions: {num_ranks}\n" in output
    assert f"allocated for two classes: {2 * num_ranks}\n" in output
    assert output.count("views: shared 1 own 1 regions 1") == 2


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ("out_of_memory", r"Rank 1 of \d \(GPU 1\): cudaMalloc of \d+ bytes for the arena: out of"),
        ("no_peer_access", r"Rank 1 of \d \(GPU 1\): no peer access to any GPU"),
        ("apart", r"Rank 0 of \d \(GPU 0\): rank 1 \(GPU 1\) cannot be reached: no peer access"),
        ("blind", r"Rank 0 of \d \(GPU 0\): the arena of rank 1 does not hold what that rank"),
    ],
)
def test_what_fails_on_one_rank_fails_on_all_alike(program, scenario, message, num_ranks):
    """Then it is tried again, with flags or a region, and works once the cause is gone."""
    output = program(scenario, num_ranks)
    for step in ("spoilt", "spoilt again", "region spoilt"):
        said = texts(output, step)
        assert len(said) == num_ranks
        assert len(set(said)) == 1, said
        assert re.search("ranks of the EP group cannot meet. " + message, said[0]), said[0]
    assert "left behind: 0" in output
    assert texts(output, "mended") == texts(output, "region mended") == ["fine"] * num_ranks
    assert "views: shared 1 own 1 regions 1" in output


def test_a_rank_that_stays_away_is_not_waited_for_for_ever(program):
    """Three ranks, rank 1 does not come. The exchange stays under way: there is no second try."""
    output = program("one_stays_away")
    alone, later = texts(output, "alone"), texts(output, "later")
    assert alone[1] == later[1] == "absent"
    for rank in (0, 2):
        assert f"rank {rank} of 3 waited 0.200000 s for the others to meet" in alone[rank]
        assert "did all of them call jax_moe_ep.reset()" in alone[rank]
        assert "an earlier meeting of this group did not come about" in later[rank]


def test_a_failure_is_told_to_all_ranks_until_a_reset(program):
    """Of the group that failed, by the rank that did; flags are clear afterwards."""
    output = program("resets")
    assert texts(output, "meet") == ["fine"] * 2
    failed = texts(output, "failed")
    assert len(failed) == 2
    assert all("rank 1 of 2 (GPU 1) gave up in" in text for text in failed), failed
    assert texts(output, "other") == ["fine"] * 4  # met, and not failed
    assert set(texts(output, "others")) == set(failed)  # what its executions say
    assert "failures: 1\nafter reset: 0" in output
    for step in ("restarted", "checked", "other restarted"):
        assert texts(output, step) == ["fine"] * 2, step
    assert "epoch 0 abort 0" in output
    assert all("gave up in" in text for text in texts(output, "failed again"))


def test_causes_are_told_before_consequences(program):
    """And failures of the own group before others'; none of before a reset."""
    output = program("tells")
    assert texts(output, "meet") == ["fine"] * 9
    for group in ("first", "third"):
        assert all("rank 1 of 2 (GPU 1) gave up in" in text for text in texts(output, group))
    assert all("rank 2 of 3 (GPU 2) stopped in" in text for text in texts(output, "second"))
    assert [len(texts(output, group)) for group in ("first", "second", "third")] == [2, 3, 4]
    assert "failures: 3\n" in output
    assert texts(output, "reset") == ["fine"] * 2


def test_memory_that_peers_do_not_map_is_an_error(program):
    """Of all ranks alike; the device that is current stays so."""
    output = program("reads_in_place", 3)
    assert (
        texts(output, "meet") == texts(output, "start") == texts(output, "middle") == ["fine"] * 3
    )
    said = texts(output, "module")
    assert len(said) == 3
    assert all(text.startswith("x is memory that the other GPUs of the process") for text in said)


REGIONS = ("region", "larger region", "largest region", "last region")


def assert_met(output, num_ranks):
    assert all(texts(output, step) == ["fine"] * num_ranks for step in REGIONS)


@pytest.mark.parametrize("num_ranks", [2, 3, 8, 16])
def test_processes_read_pools_in_place(program, num_ranks):
    """Every rank maps that of every other, once. Allocated anew at its address it is another."""
    output = program("pools", num_ranks)
    assert_met(output, num_ranks)
    once = num_ranks * (num_ranks - 1)
    assert f"\nmappings: {once}\n" in output
    assert f"mappings after the same again: {once}\n" in output
    assert f"mappings in the end: {3 * once - (num_ranks - 1)}\n" in output  # rank 0 has two
    for place in ("first", "last", "later", "earlier", "others"):
        assert texts(output, place) == ["in place"] * num_ranks, place
    for place in ("across the end", "unknown", "reallocated"):
        assert texts(output, place) == ["staged"] * num_ranks, place


@pytest.mark.parametrize("scenario", ["pools_of_halves", "pools_by_turns"])
@pytest.mark.parametrize("num_ranks", [4, 6, 8, 16])
def test_ranks_of_a_process_map_the_pools_of_others(program, scenario, num_ranks):
    """Two processes."""
    output = program(scenario, num_ranks)
    assert_met(output, num_ranks)
    assert f"\nmappings: {num_ranks * num_ranks // 2}\n" in output
    assert texts(output, "first") == texts(output, "later") == ["in place"] * num_ranks


def test_an_allocator_without_a_pool_is_staged(program):
    """Its arrays have allocations of their own: peers would keep them when the arrays are gone, and
    read them when others have come to their addresses."""
    output = program("pools_of_one_array", 2)
    assert_met(output, 2)
    assert "\nmappings: 0\n" in output
    assert texts(output, "first") == texts(output, "later") == ["staged"] * 2


@pytest.mark.parametrize("num_ranks", [3, 8, 16])
def test_who_cannot_export_stages_alone(program, num_ranks):
    """Every other rank."""
    output = program("pools_not_exported", num_ranks)
    assert_met(output, num_ranks)
    assert texts(output, "first") == (["in place", "staged"] * num_ranks)[:num_ranks]


def test_all_stage_for_one_that_cannot_map(program):
    """But that one, whom the others read."""
    output = program("pools_not_mapped", 3)
    assert_met(output, 3)
    assert "\nmappings: 4\n" in output
    assert texts(output, "first") == ["staged", "in place", "staged"]


def test_letters_that_are_lost_are_not_waited_for_long(program):
    """Half as long as the meeting: no rank gives it up. Only the sender stages."""
    output = program("pools_not_sent", 3)
    assert_met(output, 3)
    assert texts(output, "first") == ["in place", "staged", "in place"]


def test_signals_do_not_end_the_wait_for_letters(program):
    output = program("pools_interrupted", 3)
    assert_met(output, 3)
    assert texts(output, "first") == texts(output, "later") == ["in place"] * 3


def test_a_stranger_sends_no_pool(program):
    """Names of mailboxes can be read by anybody on the host: letters without the secret that the
    ranks told each other are thrown away, with their descriptors."""
    output = program("pools_and_a_stranger", 3)
    assert int(re.search(r"^letters: (\d+)$", output, re.MULTILINE)[1]) >= 6
    assert "\nmappings: 6\n" in output
    assert texts(output, "first") == texts(output, "later") == ["in place"] * 3
    assert re.search(r"^descriptors beside pools: [0-5]$", output, re.MULTILINE)
