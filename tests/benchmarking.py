"""What the tests of the benchmarks between GPUs share: a tiny one on CPU devices."""

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks import group, peer_copies, stock, timing
from benchmarks.shapes import GroupShape

DEVICES = jax.devices("cpu")  # also beside GPUs: what is tested is not the kernels
TINY = GroupShape(T=5, H=8, K=2, A=4, E=8, capacity="worst")


@functools.cache
def tiny_bench(num_ranks=2):
    """Of the reference; `times` is given by the tests that need it."""
    mesh = Mesh(np.array(DEVICES[:num_ranks]), (stock.AXIS,))
    host = timing.wall_times_us, peer_copies.wall_peer_copies_us, timing.longer_us
    return group.Bench(mesh, "reference", *host, most_calls=2, num_iterations=4)


@functools.cache
def tiny_inputs(num_ranks=2):
    shape = dataclasses.replace(TINY, R=num_ranks)
    return group.make_inputs(tiny_bench(num_ranks), shape, with_stock=True)


def routing_by_hand():
    """R = 2, T = 2, K = 2, E = 4, A = 3. Experts 0 and 1 live on rank 0, 2 and 3 on rank 1.

    Rank 0's tokens name (0, 1) and (1, 2), rank 1's (3, 2) and (0, 3): experts 0 to 3 have 2 rows
    each, so both ranks have 4 live rows and 6 aligned ones.
    """
    ids = np.array([[0, 1], [1, 2], [3, 2], [0, 3]], np.int32)
    return GroupShape(T=2, H=8, K=2, A=3, E=4, R=2, capacity="worst"), ids
