"""Microseconds of chosen ops at one point, in half a minute: to tune by. Nothing is written.

    python -m benchmarks.point combine dispatch --num-sms 32
    python -m benchmarks.point plan_and_dispatch combine --t 128 --a 1 --capacity worst --loop

The ops are those of benchmarks.group; in several processes it is started as benchmarks.ep is.
"""

from typing import Annotated

import jax
import numpy as np
import typer
from jax.sharding import Mesh

import jax_moe_ep as ep
from benchmarks import stock
from benchmarks.ep import join_processes, shrunk
from benchmarks.group import Bench, make_inputs, ops
from benchmarks.shapes import GroupShape
from benchmarks.timing import wall_times_us


def main(
    names: Annotated[list[str], typer.Argument(help="Ops, such as combine.")],
    t: int = GroupShape.T,
    h: int = GroupShape.H,
    k: int = GroupShape.K,
    a: int = GroupShape.A,
    tail: str = GroupShape.tail,
    capacity: str = GroupShape.capacity,
    routing: str = GroupShape.routing,
    num_sms: int | None = None,
    loop: Annotated[bool, typer.Option(help="An iteration of a fori_loop.")] = False,
    ranks: Annotated[int | None, typer.Option(help="GPUs to use; all, if left out.")] = None,
    wall: Annotated[bool, typer.Option(help="A dry run on any devices.")] = False,
) -> None:
    join_processes()
    mesh = Mesh(np.array(jax.devices()[:ranks]), (stock.AXIS,))
    dry = {"implementation": "reference", "times": wall_times_us, "most_calls": 2}
    bench = Bench(mesh, **(dry if wall else {}))
    shape = GroupShape(t, h, k, a, tail, R=mesh.size, routing=routing, capacity=capacity)
    shape = shrunk(shape) if wall else GroupShape(**{**vars(shape), "num_sms": num_sms})
    steps = ops(bench.config(shape))
    if unknown := set(names) - steps.keys():
        raise typer.BadParameter(f"{sorted(unknown)} is none of {sorted(steps)}")
    inputs, _, num_calls = make_inputs(bench, shape)
    programs = {
        name: bench.in_loop(steps[name], inputs[0])
        if loop
        else bench.in_turn(steps[name], inputs, num_calls)
        for name in names
    }
    times = bench.us(programs)
    if not wall:
        ep.check()
    if jax.process_index() == 0:
        print(*[f"{name} {us:.1f} us" for name, us in times.items()], sep="\n")


if __name__ == "__main__":
    typer.run(main)
