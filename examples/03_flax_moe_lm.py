"""Trains a byte-level Mixture-of-Experts language model with Flax NNX on an EP x DP mesh.

    python examples/03_flax_moe_lm.py --small              # 8 virtual CPU devices, two minutes
    python examples/03_flax_moe_lm.py --dtype bfloat16     # all GPUs of the machine
    python examples/03_flax_moe_lm.py --files a.txt b.txt --out out/mine
    python examples/03_flax_moe_lm.py --files a.txt b.txt --out out/mine --resume
    python examples/multiprocess/run.py --num-processes 8 examples/03_flax_moe_lm.py

The text is the standard library of the Python that runs this, or the files given; a tenth of it is
held out and never trained on. OUT gets summary.json, loss.png, expert_load.png and checkpoints.
On GPUs the experts need tokamax (pip install tokamax). The parts are in the folder moe_lm.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from moe_lm.config import (
    SMALL_MODEL,
    SMALL_TRAIN,
    Dtype,
    Implementation,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from moe_lm.processes import join
from moe_lm.train import Run
from rich.console import Console
from rich.table import Table
from typer import Argument, Option

NUM_CPU_DEVICES = 8


def main(
    more: Annotated[list[Path] | None, Argument(hidden=True)] = None,
    files: Annotated[list[Path] | None, Option(help="text to learn, one file or more")] = None,
    out: Annotated[Path, Option(help="folder for all that is written")] = Path("out/moe_lm"),
    small: Annotated[bool, Option("--small", help="a demo for 8 virtual CPU devices")] = False,
    resume: Annotated[bool, Option("--resume", help="go on from OUT's newest checkpoint")] = False,
    stop_at: Annotated[int | None, Option(help="save after this step and end")] = None,
    save_every: Annotated[int | None, Option(help="steps between checkpoints")] = None,
    steps: int | None = None,
    batch: Annotated[int | None, Option(help="windows a step, of all devices")] = None,
    seq: Annotated[int | None, Option(help="bytes a window")] = None,
    ep: Annotated[int | None, Option(help="ranks of one expert-parallel group")] = None,
    dp: Annotated[int | None, Option(help="expert-parallel groups")] = None,
    experts: int | None = None,
    top_k: int | None = None,
    width: int | None = None,
    layers: int | None = None,
    implementation: Annotated[Implementation | None, Option(help="of jax_moe_ep")] = None,
    dtype: Annotated[Dtype | None, Option(help="of activations and matmuls")] = None,
    seed: int | None = None,
) -> None:
    """Train a byte-level MoE language model; what is not given comes from the preset."""
    given = {name: value for name, value in locals().items() if value is not None}
    model = override(SMALL_MODEL if small else ModelConfig(), given)
    train = override(SMALL_TRAIN if small else TrainConfig(), given)
    run = RunConfig(out, (*(files or ()), *(more or ())), ep, dp, save_every, stop_at, resume)
    is_first = join(ep * dp if ep and dp else NUM_CPU_DEVICES)
    console = Console(quiet=not is_first)
    summary = Run(model, train, run, console).go()
    if summary is not None:
        console.print(result_table(summary))
        console.print(
            f"{summary['steps_per_s']:.1f} steps/s · {summary['tokens_per_s']:,.0f} tokens/s · "
            f"{summary['num_dropped']} assignments dropped",
            highlight=False,
        )
        console.print(f"written: {out}/summary.json, loss.png, expert_load.png", highlight=False)


def override[Config: (ModelConfig, TrainConfig)](
    config: Config, given: dict[str, object]
) -> Config:
    """The configuration with those of its fields that were given."""
    names = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{k: v for k, v in given.items() if k in names})


def result_table(summary: dict[str, object]) -> Table:
    table = Table("", "nats a byte", title="held-out loss")
    table.add_row("before training", f"{summary['held_out_loss_before']:.3f}")
    table.add_row("unigram entropy of the same bytes", f"{summary['unigram_entropy']:.3f}")
    table.add_row("after training", f"{summary['held_out_loss']:.3f}", style="bold")
    table.add_row("with shuffled routing", f"{summary['held_out_loss_shuffled_routing']:.3f}")
    return table


if __name__ == "__main__":
    typer.run(main)
