"""Microseconds of chosen ops at one point, in half a minute: to tune by. Nothing is written.

    python -m benchmarks.point combine dispatch --num-sms 32
    python -m benchmarks.point plan_and_dispatch combine --t 128 --a 1 --capacity worst --loop

With --loop an iteration of a fori_loop, as XLA runs it by default and captured as a CUDA graph.

The ops are those of benchmarks.group; in several processes it is started as benchmarks.ep is.
"""

from typing import Annotated

import jax
import typer

import jax_moe_ep as ep
from benchmarks.ep import join_processes, shrunk
from benchmarks.group import LOOPS, make_bench, make_inputs, ops
from benchmarks.shapes import GroupShape


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
    bench = make_bench(ranks, wall)
    shape = GroupShape(
        t, h, k, a, tail, R=bench.mesh.size, routing=routing, capacity=capacity, num_sms=num_sms
    )
    shape = shrunk(shape) if wall else shape
    steps = ops(bench.config(shape))
    if unknown := set(names) - steps.keys():
        raise typer.BadParameter(f"{sorted(unknown)} is none of {sorted(steps)}")
    inputs, _, num_calls = make_inputs(bench, shape)
    if loop:
        times = {
            f"{name} {form}": bench.in_loop_us(steps[name], inputs[0], form)
            for name in names
            for form in LOOPS
        }
    else:
        times = bench.us({name: bench.in_turn(steps[name], inputs, num_calls) for name in names})
    if not wall:
        ep.check()
    if jax.process_index() == 0:
        print(*[f"{name} {us:.1f} us" for name, us in times.items()], sep="\n")


if __name__ == "__main__":
    typer.run(main)
