"""Where do the tokens go? A tiny routing, printed row by row, and the way back.

    python examples/01_dispatch_combine.py [--implementation auto|cuda|reference]

Three tokens a rank, two experts a token, two experts a rank; on the GPUs if there are any, else on
four virtual CPU devices.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from rich.columns import Columns
from rich.console import Console
from rich.table import Table

import jax_moe_ep as ep

NUM_TOKENS, TOP_K, ALIGNMENT, HIDDEN = 3, 2, 2, 4  # T, K, A, H


def routing(num_ranks: int, num_experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [R*T, H] that hold their own number, two different experts each, their weights."""
    rng = np.random.default_rng(0)
    num_tokens = num_ranks * NUM_TOKENS
    x = np.repeat(np.arange(1, num_tokens + 1, dtype=np.float32)[:, None], HIDDEN, axis=1)
    ids = np.stack([rng.permutation(num_experts)[:TOP_K] for _ in range(num_tokens)])
    ids[1, 1] = -1  # token 1 of rank 0 wants one expert only: -1 is "no expert"
    weights = np.tile(np.array([0.75, 0.25], np.float32), (num_tokens, 1))
    return x, ids.astype(np.int32), weights


def table(rank: int, rows: np.ndarray, sources: np.ndarray, sizes: np.ndarray) -> Table:
    """The receive buffer of one rank: rows [C, H], sources [C], aligned group sizes [L]."""
    out = Table("row", "expert", "from rank", "token", "k", "x", title=f"rank {rank} receives")
    first_expert = rank * len(sizes)
    experts = np.repeat(first_expert + np.arange(len(sizes)), sizes)
    for row, expert in enumerate(experts):
        if sources[row] < 0:
            out.add_row(str(row), str(expert), "padding", "", "", f"{rows[row, 0]:g}", style="dim")
            continue
        token, k = divmod(int(sources[row]), TOP_K)
        place = (str(value) for value in (*divmod(token, NUM_TOKENS), k))
        out.add_row(str(row), str(expert), *place, f"{rows[row, 0]:g}")
    tail = f"{len(experts)} to {len(rows) - 1}" if len(experts) < len(rows) else "none"
    out.add_row(tail, "", "tail", "", "", f"{rows[len(experts) :].sum():g}", style="dim")
    return out


def main(implementation: Literal["auto", "cuda", "reference"] = "auto") -> None:
    jax.config.update("jax_num_cpu_devices", 4)  # before JAX is used; no effect on GPUs
    num_ranks = jax.device_count()
    num_experts = 2 * num_ranks
    mesh = jax.make_mesh((num_ranks,), ("expert",), axis_types=(AxisType.Auto,))
    config = ep.EpConfig(num_experts, "expert", alignment=ALIGNMENT, implementation=implementation)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    def layer(x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array) -> tuple[jax.Array, ...]:
        plan = ep.plan(topk_idx, config)
        rows = ep.dispatch(x, plan)
        # Stands for the experts: expert e multiplies by e + 1. A real one is a grouped matmul.
        first_expert = jax.lax.axis_index("expert") * plan.num_local_experts
        factors = 1.0 + first_expert + jnp.arange(plan.num_local_experts)
        y = rows * jnp.repeat(factors, plan.group_sizes, total_repeat_length=len(rows))[:, None]
        out = ep.combine(y, plan, topk_weights)
        return out, rows, ep.row_sources(plan), plan.group_sizes

    x, ids, weights = routing(num_ranks, num_experts)
    out, *buffers = (np.asarray(each) for each in layer(x, ids, weights))
    per_rank = zip(*(np.split(each, num_ranks) for each in buffers), strict=True)
    console = Console()
    console.print(Columns([table(rank, *parts) for rank, parts in enumerate(per_rank)], padding=2))

    # Every token gets the sum over its experts of weight * (expert + 1) * x; -1 adds nothing.
    expected = x * (weights * np.where(ids >= 0, ids + 1, 0)).sum(1, keepdims=True)
    np.testing.assert_array_equal(out, expected)
    console.print(f"combine: all {len(out)} tokens on {num_ranks} ranks came back as expected")


if __name__ == "__main__":
    typer.run(main)
