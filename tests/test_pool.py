"""How ranks of several processes share XLA's pools, on GPUs made of threads and a driver made of
files: who reads whom in place, and what is never sent or taken. The scenarios are in
native/pools.cc.

Needs g++ and CUDA's headers, no GPU.
"""

import re

import pytest
from native_build import needs_compiler
from scenarios import build_scenarios, texts

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build_scenarios(tmp_path_factory.mktemp("pools"), "pools")


REGIONS = ("region", "larger region", "largest region", "last region")


def assert_met(output, num_ranks):
    assert all(texts(output, step) == ["fine"] * num_ranks for step in REGIONS)


@pytest.mark.parametrize("num_ranks", [2, 3, 8, 16])
def test_processes_read_pools_in_place(program, num_ranks):
    """Every rank maps that of every other, once. Allocated anew at its address it is another."""
    output = program("all", num_ranks)
    assert_met(output, num_ranks)
    once = num_ranks * (num_ranks - 1)
    assert f"\nmappings: {once}\n" in output
    assert f"mappings after the same again: {once}\n" in output
    assert f"mappings in the end: {3 * once - (num_ranks - 1)}\n" in output  # rank 0 has two
    for place in ("first", "last", "later", "earlier", "others"):
        assert texts(output, place) == ["in place"] * num_ranks, place
    for place in ("across the end", "unknown", "reallocated"):
        assert texts(output, place) == ["staged"] * num_ranks, place


@pytest.mark.parametrize("scenario", ["halves", "by_turns"])
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
    output = program("one_array", 2)
    assert_met(output, 2)
    assert "\nmappings: 0\n" in output
    assert texts(output, "first") == texts(output, "later") == ["staged"] * 2


@pytest.mark.parametrize("num_ranks", [3, 8, 16])
def test_who_cannot_export_stages_alone(program, num_ranks):
    """Every other rank."""
    output = program("not_exported", num_ranks)
    assert_met(output, num_ranks)
    assert texts(output, "first") == (["in place", "staged"] * num_ranks)[:num_ranks]


def test_all_stage_for_one_that_cannot_map(program):
    """But that one, whom the others read."""
    output = program("not_mapped", 3)
    assert_met(output, 3)
    assert "\nmappings: 4\n" in output
    assert texts(output, "first") == ["staged", "in place", "staged"]


def test_letters_that_are_lost_are_not_waited_for_long(program):
    """Half as long as the meeting: no rank gives it up. Only the sender stages."""
    output = program("not_sent", 3)
    assert_met(output, 3)
    assert texts(output, "first") == ["in place", "staged", "in place"]


def test_signals_do_not_end_the_wait_for_letters(program):
    output = program("interrupted", 3)
    assert_met(output, 3)
    assert texts(output, "first") == texts(output, "later") == ["in place"] * 3


def test_a_stranger_sends_no_pool(program):
    """Names of mailboxes can be read by anybody on the host: letters without the secret that the
    ranks told each other are thrown away, with their descriptors."""
    output = program("a_stranger", 3)
    assert int(re.search(r"^letters: (\d+)$", output, re.MULTILINE)[1]) >= 6
    assert "\nmappings: 6\n" in output
    assert texts(output, "first") == texts(output, "later") == ["in place"] * 3
    assert re.search(r"^descriptors beside pools: [0-5]$", output, re.MULTILINE)
