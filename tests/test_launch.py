"""tests/launch.py: several processes run the tests; what hangs or dies is shown and ends."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
LIMIT_S = 120  # for a launcher that is stuck itself

# Rank 1 dies, or nobody does; then all wait in a function that is easy to find in the stacks, with
# a child of their own that waits as well.
STUCK = """
import os, subprocess, sys, time

def stuck_here():
    time.sleep(1000)

rank = int(os.environ["JAX_MOE_EP_PROCESS"])
child = subprocess.Popen(["sleep", "1000"])
print("rank", rank, "of", os.environ["JAX_MOE_EP_NUM_PROCESSES"], "got", *sys.argv[1:])
print("pids", os.getpid(), child.pid, flush=True)
if "dies" in sys.argv and rank == 1:
    os.kill(os.getpid(), 9)
if "fails" in sys.argv and rank == 1:
    sys.exit(7)
while "talks" in sys.argv:
    print("still here")
    time.sleep(0.1)
stuck_here()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "stuck.py"
    path.write_text(STUCK)
    return path


def start(logs: Path, *arguments: object) -> subprocess.Popen[str]:
    """The launcher with two ranks on CPU devices; pytest in them prints what it does by default."""
    command = [sys.executable, str(TESTS / "launch.py"), "--num-processes=2", f"--logs={logs}"]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=TESTS.parent,
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "JAX_MOE_EP_REQUIRE_GPUS": "0", "PYTEST_ADDOPTS": ""}
        | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # of whoever else has plugins installed
    )


def launch(logs: Path, *arguments: object) -> tuple[int, str]:
    """Its exit code and what it prints."""
    with start(logs, *arguments) as launcher:
        try:
            output, _ = launcher.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            launcher.terminate()
            raise
    return launcher.returncode, output


def pids(logs: Path) -> list[int]:
    """The ranks and their children, once all have written who they are."""
    texts = [(logs / f"rank{rank}.log").read_text() for rank in (0, 1)]
    lines = [line for text in texts for line in text.splitlines() if line.startswith("pids ")]
    return [int(pid) for line in lines for pid in line.split()[1:]]


def is_alive(pid: int) -> bool:
    """Whether it runs: one that has ended may wait to be noticed by whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 5
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if is_alive(pid)]


def assert_nothing_is_left(logs: Path) -> None:
    found = pids(logs)
    assert len(found) == 4
    assert_gone(found)


def test_semantic_tests_pass_in_two_processes(tmp_path: Path) -> None:
    """Over a mesh of both: every dtype arrives bit for bit, arrays without elements too."""
    chosen = "(by_hand or named_twice or every_bit_pattern or any_shape or test_auto) and reference"
    files = [TESTS / f"test_{name}.py" for name in ("plan", "dispatch")]
    code, output = launch(tmp_path, "--", "-m", "pytest", *files, "-k", chosen)
    assert code == 0, output
    assert "2 cpu devices in 2 processes" in output
    for rank in (0, 1):
        log = (tmp_path / f"rank{rank}.log").read_text()
        assert int(re.search(r"(\d+) passed, 1 skipped", log)[1]) >= 15
        assert "runs in one process only" in log


def test_a_failing_test_fails_the_launch_and_is_shown(tmp_path: Path) -> None:
    """Collecting nothing is exit code 5 of pytest on both ranks."""
    file = TESTS / "test_plan.py"
    code, output = launch(tmp_path, "--", "-m", "pytest", "-q", file, "-k", "no_such_test")
    assert code == 5, output
    assert "rank 0: exit code 5" in output
    assert "----- rank 1 -----" in output
    assert "rank 1: exit code 5" in output


@pytest.mark.parametrize(
    ("limit", "behaviour", "reason"),
    [
        ("--idle=3", "waits", "no rank has written anything for 3 s"),
        ("--timeout=4", "talks", "the ranks have not ended within 4 s"),
    ],
)
def test_a_hang_shows_the_stacks_of_all_ranks(
    tmp_path: Path, script: Path, limit: str, behaviour: str, reason: str
) -> None:
    """Each rank's stack names the function it is in; ranks and their children are gone."""
    code, output = launch(tmp_path, limit, "--", script, "--flag", behaviour)
    assert code == 124, output
    assert f"HANG: {reason}" in output
    _, first, second = output.split("\n----- rank ")
    for stack in (first, second):
        assert "most recent call first" in stack
        assert (" in stuck_here" in stack) == (behaviour == "waits")
    assert "rank 0 of 2 got --flag" in output
    assert "rank 1 of 2 got --flag" in second
    assert output.count("still running") == 2
    assert_nothing_is_left(tmp_path)


def test_a_hang_in_a_test_shows_its_stack(tmp_path: Path, script: Path) -> None:
    """Though pytest captures what goes to stderr."""
    code, output = launch(tmp_path, "--idle=3", "--", "-m", "pytest", script)
    assert code == 124, output
    for stack in output.split("\n----- rank ")[1:]:
        assert " in stuck_here" in stack
    assert output.count("still running") == 2


@pytest.mark.parametrize(("behaviour", "code"), [("dies", 128 + signal.SIGKILL), ("fails", 7)])
def test_a_rank_that_dies_ends_the_other(
    tmp_path: Path, script: Path, behaviour: str, code: int
) -> None:
    """With its exit code, after the time of grace and long before idle and timeout."""
    ended, output = launch(tmp_path, "--grace=2", "--idle=10", "--", script, behaviour)
    assert ended == code, output
    assert "a rank failed 2 s ago and others still run" in output
    assert "rank 0: still running" in output
    assert f"rank 1: exit code {code}" in output
    assert " in stuck_here" in output.split("\n----- rank ")[1]
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_launch_leaves_nothing(
    tmp_path: Path, script: Path, number: signal.Signals
) -> None:
    """Even when killed, apart from what the ranks started."""
    with start(tmp_path, "--", script) as launcher:
        deadline = time.monotonic() + LIMIT_S
        while launcher.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
            if (tmp_path / "rank1.log").exists() and len(pids(tmp_path)) == 4:
                break
        launcher.send_signal(number)
        launcher.stdout.read()
    assert launcher.returncode != 0
    if number != signal.SIGKILL:
        assert_nothing_is_left(tmp_path)
        return
    ranks, children = pids(tmp_path)[::2], pids(tmp_path)[1::2]
    for child in children:
        os.kill(child, signal.SIGKILL)
    assert_gone(ranks)
