"""Time of plan's kernels on one GPU, from ids that are already gathered."""

import functools
import pathlib
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import jax_moe_ep as ep
from benchmarks.timing import RESULTS, save, time_us
from jax_moe_ep import cuda

NUM_INPUTS = 16

# T, K, E, R.
SHAPES = [(128, 8, 256, 2), (4096, 8, 256, 2), (4096, 8, 256, 8), (16384, 8, 256, 8)]
OPTIONS = {
    "worst case": {},
    "capacity factor 1, dropping": {"capacity": 1.0, "alignment": 1},
    "by priority, dropping": {"capacity": 1.0, "alignment": 1, "drop_policy": "priority"},
}


def measure(shape: tuple[int, int, int, int], options: dict) -> float:
    num_tokens, top_k, num_experts, num_ranks = shape
    config = ep.EpConfig(
        num_experts, "expert", implementation="cuda", **{"alignment": 128, **options}
    )
    random = np.random.default_rng(0)
    inputs = []
    for _ in range(NUM_INPUTS):
        scores = random.random((num_ranks * num_tokens, num_experts), np.float32)
        ids = np.argpartition(scores, top_k, axis=1)[:, :top_k].astype(np.int32)
        rows = len(ids) if config.drop_policy == "priority" else 0
        priority = random.random((rows, top_k), np.float32)
        inputs.append((jnp.asarray(ids), jnp.asarray(priority)))
    step = functools.partial(cuda.plan_from_gathered, config=config, num_ranks=num_ranks, rank=0)
    return time_us(step, jax.device_put(inputs))


def main(out: Annotated[pathlib.Path, typer.Option(help="Folder of the JSON.")] = RESULTS) -> None:
    table = Table("T", "K", "E", "R", "options", "us")
    rows = []
    for shape in SHAPES:
        for name, options in OPTIONS.items():
            us = measure(shape, options)
            rows.append(dict(zip("TKER", shape, strict=True)) | {"options": name, "us": us})
            table.add_row(*map(str, shape), name, f"{us:.1f}")
    Console(width=100).print(table)
    print(save("plan", rows, out))


if __name__ == "__main__":
    typer.run(main)
