"""Runs a program as several processes of this machine, one per GPU, and ends all when one fails.

    python examples/multiprocess/run.py --num-processes 2 examples/03_flax_moe_lm.py --ep 2 --dp 1
    python examples/multiprocess/run.py --num-processes 2 -m my_package.train

Each process finds in its environment what jax.distributed.initialize wants of it.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import IO, Annotated

import typer
from typer import Argument, Option

Rank = subprocess.Popen[bytes]
PR_SET_PDEATHSIG = 1  # linux/prctl.h
POLL_S = 0.1
EXIT_S = 20.0  # how long the other ranks may go on when one has failed


@contextlib.contextmanager
def running(
    command: Sequence[str], num_processes: int, logs: Sequence[IO[bytes] | None] | None = None
) -> Iterator[list[Rank]]:
    """The command's ranks, output going to `logs`. Nothing of them is alive when this ends.

    Each rank leads a process group, so that what it starts dies with it, and the kernel ends the
    ranks of a launcher that was killed.
    """
    libc = ctypes.CDLL(None)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as on Ctrl-C
    ranks: list[Rank] = []
    try:
        for process, log in enumerate(logs or [None] * num_processes):
            settings = {
                "JAX_MOE_EP_COORDINATOR": coordinator,
                "JAX_MOE_EP_PROCESS": str(process),
                "JAX_MOE_EP_NUM_PROCESSES": str(num_processes),
            }
            rank = subprocess.Popen(
                command,
                env=os.environ | settings,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
            )
            ranks.append(rank)
        yield ranks
    finally:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
        for rank in ranks:
            rank.wait()


def until_done(ranks: Sequence[Rank], exit_s: float = EXIT_S) -> Iterator[None]:
    """Yields every POLL_S until all ranks have ended, or one has failed more than exit_s ago."""
    deadline = float("inf")
    while None in (codes := [rank.poll() for rank in ranks]) and time.monotonic() < deadline:
        if any(codes):
            deadline = min(deadline, time.monotonic() + exit_s)
        yield
        time.sleep(POLL_S)


def report(ranks: Sequence[Rank]) -> int:
    """Prints how the ranks ended unless all is well; the exit code of the first that failed.

    Called before those still running are ended. Like a shell's, the code is 128 + n for signal n.
    """
    codes = [rank.poll() for rank in ranks]
    codes = [code if code is None or code >= 0 else 128 - code for code in codes]
    if any(codes) or None in codes:
        texts = ("still running" if code is None else f"exit code {code}" for code in codes)
        lines = (f"rank {process}: {text}" for process, text in enumerate(texts))
        print(*lines, sep="\n", file=sys.stderr, flush=True)
    return next(filter(None, codes), 0)


def main(
    program: Annotated[list[str], Argument(help="a script, or -m and a module; its arguments")],
    num_processes: Annotated[int, Option(min=1, help="one for each GPU")] = 2,
) -> None:
    """Run PROGRAM as several processes of this machine."""
    with running([sys.executable, *program], num_processes) as ranks:
        for _ in until_done(ranks):
            pass
        code = report(ranks)
    raise typer.Exit(code)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    settings = {"ignore_unknown_options": True, "allow_interspersed_args": False}
    app.command(context_settings=settings)(main)
    app()
