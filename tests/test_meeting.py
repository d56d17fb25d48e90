"""How the ranks of a group meet, on GPUs made of threads: what they share, what they say when one
of them has a problem, and that nothing of a failed meeting is left. The scenarios are in
native/meetings.cc.

Needs g++ and CUDA's headers, no GPU.
"""

import re

import pytest
from native_build import needs_compiler
from scenarios import build_scenarios, texts

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build_scenarios(tmp_path_factory.mktemp("meetings"), "meetings")


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


def test_without_memory_at_first(program):
    """What CUDA says is told, and does not come back as the error of a later launch."""
    output = program("lacks_memory_at_first")
    full = "jax_moe_ep: cudaErrorMemoryAllocation: out of memory"
    assert texts(output, "full") == [full] * 2
    assert texts(output, "mended") == ["fine"] * 2


def test_communicators_that_do_not_block_are_refused(program):
    output = program("does_not_block")
    meet = texts(output, "meet")
    assert len(meet) == 2
    assert all("--xla_gpu_nccl_blocking_communicators at its default" in text for text in meet)
    assert all("Start the processes again" in text for text in texts(output, "later"))


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
