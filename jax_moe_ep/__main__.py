"""The command line: `python -m jax_moe_ep doctor`."""

import dataclasses
import enum
import json
import os
from typing import Annotated

import typer
from rich.console import Console

from jax_moe_ep.doctor import inspect, render

app = typer.Typer(no_args_is_help=True, add_completion=False)


class Requirement(enum.StrEnum):
    """What `--require` takes."""

    cuda = "cuda"
    reference = "reference"


@app.callback()
def main() -> None:
    """Expert-parallel dispatch and combine for Mixture-of-Experts models in JAX."""


@app.command()
def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
    require: Annotated[
        Requirement | None,
        typer.Option(
            help="Exit with 1, and the reasons on stderr, if this implementation cannot run here. "
            "An op without a kernel in this version is no reason as long as another has one."
        ),
    ] = None,
) -> None:
    """Says what this installation and this machine can run, and the remedy for what not."""
    # So that it also runs beside a job that has the GPUs' memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    report = inspect()
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        Console().print(render(report))
    if require is not None and (blockers := report.blockers(require.value)):
        for problem in blockers:
            typer.echo(f"{require} cannot run: {problem.what}. {problem.remedy}.", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="python -m jax_moe_ep")
