"""On which mesh axes an array differs, as shard_map(check_vma=True) tracks it."""

from collections.abc import Iterable
from typing import Any

import jax
from jax import lax
from jaxtyping import Array


def varying_axes(tree: Any) -> frozenset[str]:
    """The mesh axes on which some array of the tree differs, as far as shard_map tracks it."""
    types = [jax.typeof(leaf).manual_axis_type for leaf in jax.tree.leaves(tree)]
    return frozenset().union(*(each.varying for each in types))


def vary(tree: Any, axes: Iterable[str] = ()) -> Any:
    """The tree with all arrays varying on the axes given and on those where any of them does.

    A custom_vjp wants it of its operands under shard_map(check_vma=True).
    """
    axes = {*axes, *varying_axes(tree)}

    def vary(leaf: Array) -> Array:
        missing = tuple(sorted(axes - varying_axes(leaf)))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, tree)
