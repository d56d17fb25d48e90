"""A step as users run it: MoE layers inside lax.scan, forward and backward, between the GPUs of one
host.

A layer is plan, dispatch, two grouped GEMMs with SwiGLU between them, weighted combine and the
residual sum. The gradients are those of tokens, routing weights and expert weights. One process or
one a GPU, as for benchmarks.ep. The forms:

    jax_moe_ep          plan, dispatch, combine, with each tail
    stock JAX           the forms of stock.py, with gradients written as well as they: the backward
                        pass of dispatch is a combine and the other way round. What depends on the
                        routing alone is made before and not counted
    no exchange         the same GEMMs over rows that are there already: what no exchange can beat

All run the same grouped GEMM, moe_mlp's, where tokamax is installed. lax.ragged_dot, the other
choice, may be expanded to dense products by XLA, L times the work and memory.
"""

import dataclasses
import functools
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32
from rich.console import Console
from rich.table import Table

import jax_moe_ep as ep
from benchmarks import stock
from benchmarks.ep import join_processes
from benchmarks.group import Bench, largest, make_bench, one_by_one
from benchmarks.report import Row, result_name
from benchmarks.shapes import GroupShape
from benchmarks.timing import RESULTS, save
from jax_moe_ep.grouped_matmul import grouped_matmul

TOLERANCE = 2.0**-4  # of gradients through bf16 layers, relative to the largest
OURS, ALONE = "jax_moe_ep, {} tail", "no exchange"
STOCK = {
    "all_gather, psum_scatter": (stock.gathered, stock.scattered_narrow),
    "all_to_all": (stock.padded, stock.returned),
}

GroupedMatmul = Callable[[Array, Array, Array], Array]


class Weights(NamedTuple):
    """Of all layers, N, on one rank."""

    topk: Float[Array, "N T K"]
    gate_up: Float[Array, "N L H 2F"]
    down: Float[Array, "N L F H"]


class StepInputs(NamedTuple):
    """On one rank."""

    x: Float[Array, "T H"]
    rows: Float[Array, "C H"]
    weights: Weights
    ids: Int32[Array, "N T K"]
    maps: stock.StockPlan  # of every layer


# From tokens, its weights and what it knows of its routing to tokens.
Layer = Callable[[Array, Weights, Any], Array]


def grouped_gemms(alignment: int) -> dict[str, GroupedMatmul]:
    """By name; groups have multiples of `alignment` rows."""
    ours = functools.partial(grouped_matmul, alignment=alignment)
    return {"tokamax": ours, "lax": lax.ragged_dot}


def experts(
    rows: Float[Array, "C H"], weights: Weights, sizes: Int32[Array, "L"], matmul: GroupedMatmul
) -> Float[Array, "C H"]:
    """The weights are one layer's."""
    gate, up = jnp.split(matmul(rows, weights.gate_up, sizes), 2, axis=-1)
    return matmul(jax.nn.silu(gate) * up, weights.down, sizes)


def our_layer(config: ep.EpConfig, matmul: GroupedMatmul) -> Layer:
    def layer(x: Array, weights: Weights, ids: Array) -> Array:
        plan = ep.plan(ids, config)
        y = experts(ep.dispatch(x, plan), weights, plan.group_sizes, matmul)
        return ep.combine(y, plan, weights.topk)

    return layer


def stock_layer(
    scatter: Callable[..., Array], gather: Callable[..., Array], matmul: GroupedMatmul
) -> Layer:
    """scatter and gather are a dispatch and a combine of stock.py."""
    dispatch, combine = stock.with_gradients(scatter, gather)

    def layer(x: Array, weights: Weights, maps: stock.StockPlan) -> Array:
        y = experts(dispatch(x, maps), weights, maps.plan.group_sizes, matmul)
        return combine(y, weights.topk, maps)

    return layer


def lone_layer(matmul: GroupedMatmul) -> Layer:
    """Over rows instead of tokens."""
    return lambda rows, weights, sizes: experts(rows, weights, sizes, matmul)


def gradients(
    layer: Layer, pick: Callable[[StepInputs], tuple[Array, Any]]
) -> Callable[[StepInputs], tuple[Array, Weights]]:
    """Of all layers, in one scan and its reverse; pick gives what goes through the layers and what
    each knows of its routing."""

    def run(i: StepInputs) -> tuple[Array, Weights]:
        first, routings = pick(i)

        def loss(first: Array, weights: Weights) -> Array:
            def body(x: Array, each: Any) -> tuple[Array, None]:
                return x + layer(x, *each), None

            out, _ = lax.scan(body, first, (weights, routings))
            return 0.5 * jnp.square(out.astype(jnp.float32)).mean()

        return jax.grad(loss, argnums=(0, 1))(first, i.weights)

    return run


def steps(shape: GroupShape, bench: Bench, matmul: GroupedMatmul) -> dict[str, Callable[..., Any]]:
    """By form. The first is the one that others are compared with, but for the last."""
    result = {}
    for tail in ("zero", "undefined"):
        config = bench.config(dataclasses.replace(shape, tail=tail))
        result[OURS.format(tail)] = gradients(our_layer(config, matmul), lambda i: (i.x, i.ids))
    for name, forms in STOCK.items():
        result[name] = gradients(stock_layer(*forms, matmul), lambda i: (i.x, i.maps))

    def rows_and_sizes(i: StepInputs) -> tuple[Array, Array]:
        # Those of the first layer in all of them: other rows are not written.
        sizes = i.maps.plan.group_sizes
        return i.rows, jnp.broadcast_to(sizes[:1], sizes.shape)

    return result | {ALONE: gradients(lone_layer(matmul), rows_and_sizes)}


def make_inputs(bench: Bench, shape: GroupShape, inner: int, num_layers: int) -> StepInputs:
    """Weights that keep the size of what goes through them; nothing is dropped."""
    sharding = NamedSharding(bench.mesh, P(stock.AXIS))
    random = np.random.default_rng(0)
    layers = [shape.ids(random).reshape(shape.R, shape.T, shape.K) for _ in range(num_layers)]
    host_ids = np.stack(layers, 1)
    ids = jax.make_array_from_callback(host_ids.shape, sharding, host_ids.__getitem__)
    config = bench.config(shape)

    def make_map(ids: Array) -> stock.StockPlan:
        return stock.stock_plan(ids, ep.plan(ids, config))

    maps = bench.on_ranks(lambda ids: lax.map(make_map, ids))(ids)
    assert largest(maps.plan.num_dropped) == 0, f"{shape} drops rows"

    x, rows, weights = bench.on_ranks(lambda ids: random_arrays(shape, inner, ids))(ids)
    return StepInputs(x, rows, weights, ids, maps)


def random_arrays(
    shape: GroupShape, inner: int, ids: Int32[Array, "N T K"]
) -> tuple[Array, Array, Weights]:
    """One rank's tokens, rows and weights, a layer at a time, as all have over 2**31 elements."""
    key = jax.random.fold_in(jax.random.key(0), lax.axis_index(stock.AXIS))

    def normal(key: Array, *size: int, terms: int = 1) -> Array:
        return jax.random.normal(key, size, jnp.bfloat16) * terms**-0.5

    def layer(key: Array) -> Weights:
        topk, up, down = jax.random.split(key, 3)
        return Weights(
            jax.nn.softmax(jax.random.normal(topk, ids.shape[1:])),
            normal(up, shape.num_local, shape.H, 2 * inner, terms=shape.H),
            normal(down, shape.num_local, inner, shape.H, terms=inner),
        )

    tokens, rows, weights = jax.random.split(key, 3)
    return (
        normal(tokens, shape.T, shape.H),
        normal(rows, shape.num_rows, shape.H),
        lax.map(layer, jax.random.split(weights, len(ids))),
    )


def check(bench: Bench, forms: dict[str, Any], inputs: StepInputs) -> dict[str, Any]:
    """The forms without those, named on stderr, whose gradients are not those of the first. The
    first and "no exchange", which computes something else, are compared with themselves: a GEMM
    that does not repeat itself makes all others wrong."""
    first, *_ = forms.values()

    def difference(
        reference: Callable[..., Any], form: Callable[..., Any], i: StepInputs
    ) -> tuple[Array, Weights]:
        expected, actual = one_by_one([(reference, i), (form, i)])
        return jax.tree.map(stock.largest_difference, actual, expected)

    kept = {}
    for name, form in forms.items():
        reference = form if name == ALONE else first
        x, weights = bench.on_ranks(functools.partial(difference, reference, form))(inputs)
        leaves = weights._asdict() | ({} if name == ALONE else {"x": x})  # its tail is undefined
        off = {leaf: largest(each) for leaf, each in leaves.items()}
        if jax.process_index() == 0:
            print(f"checked: {name}", file=sys.stderr)
        if max(off.values()) <= (0.0 if form is reference else TOLERANCE):
            kept[name] = form
        else:
            print(f"{name} is left out: its gradients are off by {off}", file=sys.stderr)
    return kept


def measure(bench: Bench, shape: GroupShape, inner: int, num_layers: int, gemm: str) -> list[Row]:
    """Microseconds a layer of every form, after a comparison of the gradients."""
    inputs = make_inputs(bench, shape, inner, num_layers)
    forms = check(bench, steps(shape, bench, grouped_gemms(shape.A)[gemm]), inputs)
    us = bench.us({name: bench.in_turn(form, [inputs], 1) for name, form in forms.items()})
    if bench.implementation == "cuda":
        ep.check()
    point = {**vars(shape), "C": shape.num_rows, "F": inner, "layers": num_layers, "gemm": gemm}
    return [
        {**point, "tail": tail_of(name), "op": "layer", "form": name, "us": us[name] / num_layers}
        for name in forms
    ]


def tail_of(form: str) -> str:
    return "undefined" if form == OURS.format("undefined") else "zero"


def show(rows: list[Row], console: Console) -> None:
    letters = ("T", "H", "F", "K", "A", "E", "C", "layers", "gemm")
    table = Table(*letters, "form", "us a layer", "us beside the GEMMs")
    alone = min((r["us"] for r in rows if r["form"] == ALONE), default=None)
    for r in rows:
        cells = [str(r[letter]) for letter in letters]
        beside = "-" if alone is None else f"{r['us'] - alone:.1f}"
        table.add_row(*cells, r["form"], f"{r['us']:.1f}", beside)
    console.print(table)


def main(
    out: Annotated[pathlib.Path, typer.Option(help="Folder of the JSON.")] = RESULTS,
    wall: Annotated[
        bool, typer.Option(help="A dry run on any devices: tiny shapes, reference, host's clock.")
    ] = False,
    ranks: Annotated[int | None, typer.Option(help="GPUs to use; all, if left out.")] = None,
    tokens: Annotated[int, typer.Option(help="T, of a rank.")] = 4096,
    hidden: Annotated[int, typer.Option(help="H.")] = 7168,
    inner: Annotated[int, typer.Option(help="F, the width of an expert.")] = 2048,
    num_experts: Annotated[int, typer.Option("--experts", help="E.")] = 64,
    num_layers: Annotated[int, typer.Option("--layers", help="Iterations of the scan.")] = 3,
    gemm: Annotated[
        str | None, typer.Option(help="tokamax or lax; tokamax where it is, if left out.")
    ] = None,
) -> None:
    join_processes()
    bench = make_bench(ranks, wall)
    num_ranks = bench.mesh.size
    shape = GroupShape(tokens, hidden, E=num_experts, R=num_ranks)
    if wall:
        shape, inner, num_layers = GroupShape(6, 32, 2, 4, E=4 * num_ranks, R=num_ranks), 16, 2
    has_tokamax = importlib.util.find_spec("tokamax") is not None and not wall
    gemm = gemm or ("tokamax" if has_tokamax else "lax")
    if gemm not in (known := grouped_gemms(shape.A)):
        raise typer.BadParameter(f"--gemm {gemm} is none of {', '.join(known)}")
    rows = measure(bench, shape, inner, num_layers, gemm)
    if jax.process_index() == 0:
        show(rows, Console(width=140))
        name = result_name("step", num_ranks)
        print(save(name, rows, out, xla_flags=os.environ.get("XLA_FLAGS", "")))


if __name__ == "__main__":
    typer.run(main)
