"""What happens when ranks stop, die, disagree or cannot meet. Each case is a process of its own,
with command buffers on; failure_cases.py holds them. Needs two GPUs."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import pytest

GPUS = [device for device in jax.devices() if device.platform == "gpu"]
pytestmark = pytest.mark.skipif(
    len(GPUS) < 2 or jax.process_count() > 1, reason="needs two GPUs and starts its own processes"
)

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
        [sys.executable, CASES, name, *more],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes, fine=(0,)):
    """The outputs, once all have ended in time; a hang is killed and shown."""
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=LIMIT_S)[0])
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert all(code in fine for code in codes), f"{codes}\n" + "\n".join(outputs)
    return outputs


def one_process(name):
    return finish(start(name))[0]


def two_processes(name, fine=(0,)):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    return finish(*[start(name, str(rank), coordinator) for rank in range(2)], fine=fine)


def test_a_rank_that_stops_and_a_reset():
    output = one_process("stopped_and_reset")
    check, execution = output.split("check: ")[1].split("next execution: ")
    for text in (check, execution):
        assert "rank 0 of 2 (GPU 0) gave up in dispatch(T=64, K=4, 1024 bytes a row" in text
        assert "after waiting 2.000000 s for the begin of the same call by rank 1" in text
        assert "jax_moe_ep.reset()" in text


def test_a_rank_that_stops_in_a_plan():
    output = one_process("stopped_in_a_plan")
    assert "rank 0 of 2 (GPU 0) gave up in plan(T=64, K=4, 16 bytes a row" in output


def test_eight_replayed_calls_end_in_one_budget():
    assert "gave up in dispatch" in one_process("eight_calls_end_in_one_budget")


def test_a_stall_of_a_minute_survives():
    assert "survived" in one_process("a_stall_survives")


def test_no_memory_for_one_arena():
    output = one_process("out_of_memory")
    assert "the ranks of the EP group cannot meet. Rank 1 of 2 (GPU 1): cudaMalloc" in output
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in output


def test_no_peer_access():
    output = one_process("no_peer_access")
    assert "cannot meet. Rank 0 of 2 (GPU 0): no peer access" in output


def test_a_rank_that_is_killed():
    """Our error comes before the heartbeat's: 2 s here, while jax.distributed waits for 100 s."""
    survivor, _ = two_processes("killed", fine=(0, -9))
    assert "check: jax_moe_ep: rank 0 of 2" in survivor
    assert "gave up in dispatch" in survivor.split("next execution: ")[1]


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("another_order", "dispatch(T=64, K=4, 1024 bytes", "combine(T=64, K=4, 1024 bytes"),
        ("another_shape", "dispatch(T=64, K=4, 1024 bytes", "dispatch(T=64, K=4, 512 bytes"),
        ("another_option", "dispatch(T=64, K=4, 1024 bytes", "options"),
    ],
)
def test_ranks_in_different_calls(name, one, other):
    """At least one of them finds it and names both calls; the other stops because of it, or finds
    it too."""
    outputs = two_processes(name)
    assert any(" of the group is " in output for output in outputs), outputs
    for output in outputs:
        assert " of the group is " in output or "gave up; the error there says why" in output
        assert one in output or other in output
    both = next(output for output in outputs if " of the group is " in output)
    assert one in both
    assert other in both
