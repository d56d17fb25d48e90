"""What happens when ranks stop, die, come late, disagree or cannot meet. Each case is a process of
its own, or one a rank, with command buffers on; failure_cases.py holds them. On 2, 4 or 8 GPUs, all
that there are."""

import os
import pathlib
import re
import socket
import subprocess
import sys

import pytest
from groups import R, needs_gpus
from helpers import NUM_PROCESSES

ODD = R // 2  # the rank that fails
pytestmark = [
    needs_gpus,
    pytest.mark.skipif(NUM_PROCESSES > 1, reason="starts its own processes"),
]

CASES = pathlib.Path(__file__).parent / "failure_cases.py"
LIMIT_S = 150


def start(name, *more):
    environment = {
        **os.environ,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        # Calls alone and in loops are captured too; ranks with other programs compile alone.
        "XLA_FLAGS": "--xla_gpu_graph_min_graph_size=1 --xla_gpu_shard_autotuning=false",
    }
    return subprocess.Popen(
        [sys.executable, CASES, name, str(R), *more],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes, fine=(0,)):
    """The outputs, once all have ended in time; a hang is killed and shown. Rank 0 is told to end
    when the others have."""
    outputs = []
    try:
        for process in reversed(processes):
            outputs.insert(0, process.communicate(timeout=LIMIT_S)[0])
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert all(code in fine for code in codes), f"{codes}\n" + "\n".join(outputs)
    return outputs


def one_process(name):
    return finish(start(name))[0]


def a_process_each(name, fine=(0,)):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    return finish(*[start(name, str(rank), coordinator) for rank in range(R)], fine=fine)


RANK = r"rank (\d+) of (\d+) \(GPU (\d+)\)"
GAVE_UP = re.compile(RANK + r" gave up in (\w+)\(.*? after waiting (\S+) s .*? by rank (\d+): ")
STOPPED = re.compile(RANK + r" stopped in (\w+)\(.*? because rank (\d+) gave up; the error there")


def reasons(text, num_ranks=R):
    """Ranks that gave up, with the op and the rank they waited for; ranks that stopped because one
    of them had."""
    gave_up = {int(rank): (op, int(peer)) for rank, _, _, op, _, peer in GAVE_UP.findall(text)}
    stopped = {int(rank): int(peer) for rank, _, _, _, peer in STOPPED.findall(text)}
    said = GAVE_UP.findall(text) + STOPPED.findall(text)
    assert {int(size) for _, size, *_ in said} == {num_ranks}, text
    for rank in stopped:
        assert first_of(stopped, rank) in gave_up, text
    return gave_up, stopped


def first_of(stopped, rank):
    """The rank whose error says why: one that stopped may give up too, after it has said so, and
    others name it then."""
    seen = set()
    while rank in stopped:
        assert rank not in seen, stopped
        seen.add(rank)
        rank = stopped[rank]
    return rank


def assert_others_name(text, odd, op, num_ranks=R):
    """Every rank but the odd one has an error: it waited for the odd one in this op, or for nobody
    because one that did gave up."""
    gave_up, stopped = reasons(text, num_ranks)
    assert set(gave_up.values()) == {(op, odd)}, text
    assert gave_up.keys() | stopped.keys() == set(range(num_ranks)) - {odd}, text


def test_a_rank_that_stops_and_a_reset():
    output = one_process("stopped_and_reset")
    check, execution = output.split("check: ")[1].split("next execution: ")
    assert_others_name(check, ODD, "dispatch")
    assert {waited for *_, waited, _ in GAVE_UP.findall(check)} == {"2.000000"}
    for text in (check, execution):
        assert f" of {R} (GPU " in text
        assert " gave up in dispatch(T=64, K=4, 1024 bytes a row" in text
        assert f"s for the begin of the same call by rank {ODD}: " in text
        assert "jax_moe_ep.reset()" in text


def test_a_rank_that_is_too_late():
    """It has an error too, and names one that gave up."""
    gave_up, stopped = reasons(one_process("later_than_the_budget").split("check: ")[1])
    assert set(gave_up.values()) == {("dispatch", ODD)}
    assert ODD in stopped
    assert gave_up.keys() | stopped.keys() == set(range(R))


@pytest.mark.skipif(R < 4, reason="needs 4 GPUs")
def test_a_rank_that_stops_in_one_of_two_groups():
    """Only its own group fails: the second one, in which it is the first rank."""
    output = one_process("stopped_beside_another_group").split("check: ")[1]
    output, execution = output.split("next execution: ")
    assert_others_name(output, ODD - R // 2, "dispatch", R // 2)
    assert "gave up in dispatch" in execution  # on the devices of both, which begin together
    assert {int(gpu) for _, _, gpu, *_ in GAVE_UP.findall(output)} <= set(range(R // 2, R))


def test_a_rank_that_stops_in_a_plan():
    output = one_process("stopped_in_a_plan").split("check: ")[1]
    assert_others_name(output, ODD, "plan")
    assert " gave up in plan(T=64, K=4, 16 bytes a row" in output


def test_eight_replayed_calls_end_in_one_budget():
    output = one_process("eight_calls_end_in_one_budget").split("check: ")[1]
    assert_others_name(output, ODD, "dispatch")


def test_a_stall_of_a_minute_survives():
    assert "survived" in one_process("a_stall_survives")


def test_no_memory_for_one_arena():
    output = one_process("out_of_memory")
    rank = f"Rank {ODD} of {R} (GPU {ODD})"
    assert f"the ranks of the EP group cannot meet. {rank}: cudaMalloc" in output
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in output


def test_no_peer_access():
    output = one_process("no_peer_access")
    assert f"cannot meet. Rank 0 of {R} (GPU 0): no peer access" in output


def test_a_rank_that_is_killed():
    """Our error comes before the heartbeat's: 2 s here, while jax.distributed waits for 100 s. Each
    process has the error of its own rank."""
    outputs = a_process_each("killed", fine=(0, -9))
    survivors = [output for rank, output in enumerate(outputs) if rank != ODD]
    parts = [output.split("check: ")[1].split("next execution: ") for output in survivors]
    assert_others_name("\n".join(check for check, _ in parts), ODD, "dispatch")
    for check, execution in parts:
        for pattern in (GAVE_UP, STOPPED):
            assert pattern.findall(check) == pattern.findall(execution)[:1], (check, execution)


MISMATCH = re.compile(rf"call \d+ of the group is .*? on {RANK} but .*? on rank (\d+)\. ")


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("another_order", "dispatch(T=64, K=4, 1024 bytes", "combine(T=64, K=4, 1024 bytes"),
        ("another_shape", "dispatch(T=64, K=4, 1024 bytes", "dispatch(T=64, K=4, 512 bytes"),
        ("another_option", "dispatch(T=64, K=4, 1024 bytes", "options"),
    ],
)
def test_ranks_in_different_calls(name, one, other):
    """At least one of them finds it and names both calls and the odd rank; the others stop because
    of it, or find it too."""
    outputs = a_process_each(name)
    found = {}
    for rank, output in enumerate(outputs):
        if said := MISMATCH.search(output):
            me, size, _, peer = map(int, said.groups())
            assert (me, size) == (rank, R), output
            assert (me == ODD) != (peer == ODD), output
            assert one in output
            assert other in output
            found[rank] = peer
    assert found, outputs
    stopped = {}
    for rank, output in enumerate(outputs):
        if rank not in found:
            ((me, *_, peer),) = STOPPED.findall(output)
            assert int(me) == rank, output
            assert one in output or other in output
            stopped[rank] = int(peer)
    assert all(first_of(stopped, rank) in found for rank in stopped), outputs
