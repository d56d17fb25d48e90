"""Runs Python once per rank, on one machine, for the tests; a hang is a failure that shows itself.

    python tests/launch.py --num-processes 2 -- -m pytest tests/test_combine.py -k cuda

Rank 0's output is shown as it comes, that of the others when they fail. When no rank has written
anything for IDLE seconds, or all of it takes longer than TIMEOUT, every rank prints the Python
stacks of its threads into its log, the ends of all logs are shown, and the ranks are killed.
"""

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

sys.path.append(str(Path(__file__).parents[1] / "examples" / "multiprocess"))

from run import EXIT_S, Rank, report, running, until_done

HANG = 124  # the exit code of timeout(1)
DUMP_S = 2.0  # for the stacks to be written
TAIL_BYTES = 4000  # of a log, before the stacks

# Before all else in every rank: what prints its stacks on SIGUSR1, where pytest does not capture
# it, and while a call into C does not return. Then the arguments as python itself takes them.
BOOTSTRAP = """
import faulthandler, os, runpy, signal, sys
faulthandler.register(signal.SIGUSR1, file=os.dup(2), all_threads=True)
del sys.argv[0]
if sys.argv[0] == "-m":
    sys.path[0] = os.getcwd()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Log:
    """The file that one rank writes, and how much of it has been shown."""

    def __init__(self, path: Path):
        self.path = path
        self._shown = 0

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def show(self, tail_bytes: int | None = None) -> None:
        """Prints what has not been shown, at most the last tail_bytes of it."""
        with self.path.open("rb") as file:
            skipped = 0 if tail_bytes is None else max(self.size - tail_bytes - self._shown, 0)
            file.seek(self._shown + skipped)
            text = file.read()
            self._shown = file.tell()
        if skipped:
            print(f"[... {skipped} bytes, all in {self.path}]")
        print(text.decode(errors="replace"), end="", flush=True)


def watch(
    ranks: Sequence[Rank], logs: Sequence[Log], timeout: float, idle: float, grace: float
) -> str | None:
    """Shows rank 0's output until all ranks have ended; else the reason not to wait for them."""
    started = written = time.monotonic()
    sizes = [0] * len(logs)
    for _ in until_done(ranks, grace):
        logs[0].show()
        now = time.monotonic()
        if sizes != (sizes := [log.size for log in logs]):
            written = now
        if now - written > idle:
            return f"no rank has written anything for {idle:g} s"
        if now - started > timeout:
            return f"the ranks have not ended within {timeout:g} s"
    logs[0].show()
    is_running = any(rank.poll() is None for rank in ranks)
    return f"a rank failed {grace:g} s ago and others still run" if is_running else None


def show_stacks(ranks: Sequence[Rank], logs: Sequence[Log]) -> None:
    """Prints where every rank is, after the end of what it wrote."""
    before = [log.size for log in logs]
    for rank in ranks:
        if rank.poll() is None:
            os.kill(rank.pid, signal.SIGUSR1)
    time.sleep(DUMP_S)
    for process, (log, size) in enumerate(zip(logs, before, strict=True)):
        print(f"\n----- rank {process} -----")
        log.show(TAIL_BYTES + log.size - size)


def show_failed(ranks: Sequence[Rank], logs: Sequence[Log]) -> None:
    """Prints the end of what the ranks wrote that failed, apart from rank 0's: it was shown."""
    for process, (rank, log) in enumerate(zip(ranks, logs, strict=True)):
        if process > 0 and rank.poll():
            print(f"\n----- rank {process} -----")
            log.show(TAIL_BYTES)


def main(
    program: Annotated[list[str], Argument(help="arguments of python: -m MODULE ... or FILE ...")],
    num_processes: Annotated[int, Option(min=1, help="ranks, one for each GPU")] = 2,
    timeout: Annotated[float, Option(help="seconds for all of it")] = 600,
    idle: Annotated[float, Option(help="seconds without output that are a hang")] = 120,
    grace: Annotated[float, Option(help="seconds the others have when a rank has failed")] = EXIT_S,
    logs: Annotated[Path | None, Option(help="folder for rank0.log, rank1.log, ...")] = None,
) -> None:
    """Run Python once per rank; exit as the first rank that failed, or with 124 on a hang."""
    os.environ["PYTHONUNBUFFERED"] = "1"
    command = [sys.executable, "-c", BOOTSTRAP, *program]
    folder = logs or Path(tempfile.mkdtemp(prefix="jax_moe_ep_"))
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"rank{process}.log" for process in range(num_processes)]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        ranks = stack.enter_context(running(command, num_processes, files))
        outputs = [Log(path) for path in paths]
        hang = watch(ranks, outputs, timeout, idle, grace)
        if hang is None:
            show_failed(ranks, outputs)
        else:
            print(f"\nHANG: {hang}")
            show_stacks(ranks, outputs)
        code = report(ranks)
    print(f"logs: {folder}")
    raise typer.Exit(HANG if hang is not None and code == 0 else code)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(context_settings={"allow_interspersed_args": False})(main)
    app()
