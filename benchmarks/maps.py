"""Routing maps on one GPU: ids to a dense map and back, against XLA's usual forms, and the plans of
both, beside the dispatch that they serve."""

import functools
import pathlib
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from jax import lax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jax_moe_ep as ep
from benchmarks.timing import RESULTS, save, time_us

H, K = 7168, 8
NUM_INPUTS = 16
NUM_DISPATCHES = 2  # whose rows are far beyond L2 alone

# T, E, and whether plan and dispatch are measured there too.
SHAPES = [(128, 256, True), (4096, 256, True), (16384, 256, True), (4096, 64, False)]

# Every step is a function of (ids [T, K], weights [T, K], routing_map [T, E], probs [T, E]).
Step = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], Any]


def scatter(ids: jax.Array, weights: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    place = jnp.arange(len(ids))[:, None], ids
    shape = len(ids), num_experts
    return jnp.zeros(shape, bool).at[place].set(True), jnp.zeros(shape).at[place].add(weights)


def one_hot(ids: jax.Array, weights: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    is_named = jax.nn.one_hot(ids, num_experts, dtype=bool)  # [T, K, E]
    return is_named.any(1), (is_named * weights[..., None]).sum(1)


def by_top_k(routing_map: jax.Array, probs: jax.Array) -> tuple[jax.Array, jax.Array]:
    num_experts = routing_map.shape[1]
    first = jnp.where(routing_map, num_experts - jnp.arange(num_experts), 0)
    found, ids = lax.top_k(first, K)
    weights = jnp.take_along_axis(probs, ids, axis=1)
    return jnp.where(found > 0, ids, -1), jnp.where(found > 0, weights, 0)


def by_argsort(routing_map: jax.Array, probs: jax.Array) -> tuple[jax.Array, jax.Array]:
    ids = jnp.argsort(~routing_map, axis=1, stable=True)[:, :K]
    is_named = jnp.take_along_axis(routing_map, ids, axis=1)
    weights = jnp.take_along_axis(probs, ids, axis=1)
    return jnp.where(is_named, ids, -1), jnp.where(is_named, weights, 0)


def map_steps(num_experts: int) -> dict[str, Step]:
    def forward(to_dense: Callable[..., Any]) -> Step:
        return lambda ids, weights, routing_map, probs: to_dense(ids, weights, num_experts)

    def gradient(to_dense: Callable[..., Any]) -> Step:
        def step(ids, weights, routing_map, probs):
            return jax.vjp(lambda w: to_dense(ids, w, num_experts)[1], weights)[1](probs)

        return step

    def back(to_topk: Callable[..., Any]) -> Step:
        return lambda ids, weights, routing_map, probs: to_topk(routing_map, probs)

    forms = {"topk_to_dense": ep.topk_to_dense, "scatter": scatter, "one-hot": one_hot}
    inverses = {
        "dense_to_topk": functools.partial(ep.dense_to_topk, top_k=K),
        "lax.top_k": by_top_k,
        "argsort": by_argsort,
    }
    return {
        **{f"forward: {name}": forward(f) for name, f in forms.items()},
        **{f"gradient: {name}": gradient(f) for name, f in forms.items()},
        **{f"back: {name}": back(f) for name, f in inverses.items()},
    }


def plan_steps(config: ep.EpConfig) -> dict[str, Step]:
    return {
        "plan of ids": lambda ids, *rest: ep.plan(ids, config),
        "plan of a map": lambda ids, w, routing_map, p: ep.plan(routing_map, config, top_k=K),
    }


def make_inputs(num_tokens: int, num_experts: int) -> list[tuple[jax.Array, ...]]:
    """Uniform routing to K different experts."""

    @jax.jit
    def make(key):
        scores = jax.random.uniform(key, (num_tokens, num_experts))
        weights, ids = lax.top_k(scores, K)
        return ids, weights, *ep.topk_to_dense(ids, weights, num_experts)

    return [make(jax.random.key(i)) for i in range(NUM_INPUTS)]


def dispatch_us(inputs: list[tuple[jax.Array, ...]], config: ep.EpConfig) -> float:
    inputs = inputs[:NUM_DISPATCHES]
    plans = [jax.jit(lambda ids: ep.plan(ids, config))(ids) for ids, *_ in inputs]
    shape = len(inputs[0][0]), H
    x = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(len(plans))]
    return time_us(ep.dispatch, list(zip(x, plans, strict=True)))


def measure(
    num_tokens: int, num_experts: int, with_plans: bool, implementation: Any = "cuda"
) -> list[dict[str, Any]]:
    config = ep.EpConfig(num_experts, (), implementation=implementation)
    inputs = make_inputs(num_tokens, num_experts)
    steps = map_steps(num_experts) | (plan_steps(config) if with_plans else {})
    us = {name: time_us(step, inputs) for name, step in steps.items()}
    if with_plans:
        us["dispatch"] = dispatch_us(inputs, config)
    point = {"T": num_tokens, "H": H, "K": K, "E": num_experts}
    return [{**point, "op": name, "us": value} for name, value in us.items()]


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("T", "E", "op", "us", "of dispatch")
    dispatch = {(r["T"], r["E"]): r["us"] for r in rows if r["op"] == "dispatch"}
    for r in rows:
        total = dispatch.get((r["T"], r["E"]))
        share = f"{r['us'] / total:.1%}" if total else "-"
        table.add_row(str(r["T"]), str(r["E"]), r["op"], f"{r['us']:.1f}", share)
    Console(width=100).print(table)


def main(
    out: Annotated[pathlib.Path, typer.Option(help="Folder of the JSON.")] = RESULTS,
    quick: Annotated[bool, typer.Option(help="T = 128 only; maps-quick.json.")] = False,
) -> None:
    rows = []
    for shape in track(SHAPES[:1] if quick else SHAPES, "measuring"):
        rows += measure(*shape)
    show(rows)
    print(save("maps" + "-quick" * quick, rows, out))


if __name__ == "__main__":
    typer.run(main)
