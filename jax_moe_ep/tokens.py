"""Sequence parallelism around an MoE layer: every rank takes a part of the tokens, and back.

Plain JAX inside `jax.shard_map`. T is the number of tokens, n that of the ranks of the sequence
axis, P = ceil(T/n) the tokens of one rank. The last ranks hold fewer real ones, and pads.
"""

from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from jax_moe_ep.bits import bits_dtype
from jax_moe_ep.checks import check_axes, check_choice, check_integers
from jax_moe_ep.ids import as_ids
from jax_moe_ep.varying import vary, varying_axes

Ragged = Literal["pad", "error"]
Pad = Literal["none", "expert0"]


def split_tokens(
    x: PyTree[Shaped[Array, "..."]],
    axis_name: str | tuple[str, ...],
    *,
    dim: int = 0,
    ragged: Ragged = "pad",
) -> tuple[PyTree[Shaped[Array, "..."]], Bool[Array, "P"]]:
    """Takes this rank's tokens of arrays that every rank of an axis holds.

    On rank r of the n of the axis: `local = pad(x, P*n - T)[r*P : (r+1)*P]` along dim. A multiple
    of n is not padded: a dynamic_slice is all that happens.

    Args:
      x: an array or a pytree of arrays, [T, ...] or, with dim=1, [B, T, ...]; any dtype. The same
        on all ranks of axis_name, which is checked where JAX knows it (check_vma=True).
      axis_name: the sequence axis, or a tuple of axes whose ranks count in row-major order of the
        tuple. It may be the EP axis, a part of it, or another one.
      dim: the dimension of the tokens, in every array: batches [B, T, ...] keep their order.
      ragged: what to do when T is not a multiple of n: "pad" with zeros, or raise an "error".

    Returns:
      The parts, with P in place of T, and is_real [P]: False for pads.

    Differentiable in floating leaves: the gradient is `merge_tokens`, which drops the pads'.

    Raises:
      TypeError, ValueError: for a wrong shape or option, an array that differs along the axis, or
        outside shard_map.

    Example:
      >>> import jax, jax_moe_ep as ep
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((2,), ("seq",))
      >>> split = lambda x: ep.split_tokens(x, "seq")
      >>> jax.shard_map(split, mesh=mesh, in_specs=P(), out_specs=P("seq"))(jax.numpy.arange(1, 4))
      (Array([1, 2, 3, 0], dtype=int32), Array([ True,  True,  True, False], dtype=bool))

    Megatron-LM's scatter_to_sequence_parallel_region, megatron/core/tensor_parallel/mappings.py.
    """
    axes = check_axes("split_tokens", axis_name, at_least=1)
    check_choice("jax_moe_ep.split_tokens", "ragged", ragged, get_args(Ragged))
    leaves, treedef = jax.tree.flatten(jax.tree.map(jnp.asarray, x))
    size = _common_size("split_tokens", "x", leaves, dim)
    num_ranks = lax.axis_size(axes)
    if ragged == "error" and size % num_ranks:
        raise ValueError(
            f"jax_moe_ep.split_tokens: T = {size} tokens (dimension {dim} of x) are not a multiple "
            f"of the {num_ranks} ranks of axis {axis_name!r}, which ragged='error' refuses. Pad x "
            "or take ragged='pad'"
        )
    _check_replicated(leaves, axes)
    part = -(-size // num_ranks)
    if part * num_ranks == size:
        is_real = jnp.ones(part, bool)
    else:
        is_real = lax.axis_index(axes) * part + jnp.arange(part) < size
    local = treedef.unflatten([_split(leaf, axes, dim) for leaf in leaves])
    return local, vary(is_real, axes if _is_tracked(axes) else ())


def merge_tokens(
    local: PyTree[Shaped[Array, "..."]],
    axis_name: str | tuple[str, ...],
    *,
    size: int,
    dim: int = 0,
) -> PyTree[Shaped[Array, "..."]]:
    """Puts the parts of all ranks together again, without the pads: the inverse of `split_tokens`.

    `x = all_gather(local, axis_name, axis=dim, tiled=True)[:size]` along dim.

    Args:
      local: an array or a pytree of arrays, with P tokens in dimension dim; any dtype.
      axis_name: the axis given to `split_tokens`.
      size: T, the tokens of all ranks; P must be ceil(T/n).
      dim: the dimension of the tokens, in every array.

    Returns:
      The arrays with T in place of P, the same on all ranks; JAX knows it, so that they may leave
      shard_map(check_vma=True) through `P()`.

    Differentiable: the gradient is `split_tokens`, with zeros for the pads. With check_vma=False,
    differentiate outside of shard_map: JAX then gives every rank an n-th of the gradient, and this
    op sums them. Inside, where every rank has all of it, that sum is n times too large.

    Raises:
      TypeError, ValueError: for a wrong shape or option, or outside shard_map.

    Megatron-LM's gather_from_sequence_parallel_region, megatron/core/tensor_parallel/mappings.py,
    with tensor_parallel_output_grad=False under check_vma=True and True without.
    """
    axes = check_axes("merge_tokens", axis_name, at_least=1)
    if type(size) is not int or size < 0:
        raise ValueError(
            f"jax_moe_ep.merge_tokens: size must be T, an int of at least 0, got {size!r}"
        )
    leaves, treedef = jax.tree.flatten(jax.tree.map(jnp.asarray, local))
    part, num_ranks = _common_size("merge_tokens", "local", leaves, dim), lax.axis_size(axes)
    if part != -(-size // num_ranks):
        raise ValueError(
            f"jax_moe_ep.merge_tokens: size = {size} tokens over the {num_ranks} ranks of axis "
            f"{axis_name!r} are {-(-size // num_ranks)} a rank, but local has {part} in dimension "
            f"{dim}. Give the T, axis_name and dim that split_tokens had"
        )
    return treedef.unflatten([_merge(leaf, axes, dim, size) for leaf in leaves])


def mask_routing(
    topk_idx: Int[Array, "... K"],
    topk_weights: Float[Array, "... K"],
    is_real: Bool[Array, "..."],
    *,
    pad: Pad = "none",
) -> tuple[Int[Array, "... K"], Float[Array, "... K"]]:
    """Takes the pads, or any masked tokens, out of the routing.

    `where(is_real, topk_idx, -1), where(is_real, topk_weights, 0)`. Masked tokens then have no
    rows: whatever they hold, NaN included, stays with them, they load no expert and cross no wire,
    and their combined output is +0.

    Args:
      topk_idx: [..., K] int32 or int64, the experts of the tokens.
      topk_weights: [..., K] floating.
      is_real: [...] bool, the tokens' shape or the end of it: [P] for [B, P, K].
      pad: what becomes of the others: "none", or "expert0": they go to expert 0, K times, with
        weight 0, to compare with torchtitan. These have rows: they count in the loads, take
        capacity, and NaN in them reaches the gradient of expert 0. With K > 1 they name an expert
        twice, which the worst case covers only with EpConfig(distinct_experts=False).

    Returns:
      topk_idx and topk_weights, with the shapes and dtypes they had.

    Differentiable in topk_weights: exact zeros where masked.

    Raises:
      TypeError, ValueError: for a wrong shape, dtype or option.

    Example:
      >>> import jax.numpy as jnp, jax_moe_ep as ep
      >>> weights, is_real = jnp.ones((2, 1)), jnp.array([True, False])
      >>> ep.mask_routing(jnp.array([[3], [5]]), weights, is_real)[0].tolist()
      [[3], [-1]]

    "expert0" is the padding of torchtitan's pull request 3193.
    """
    check_choice("jax_moe_ep.mask_routing", "pad", pad, get_args(Pad))
    _check_routing(topk_idx, topk_weights, is_real)
    is_real = jnp.asarray(is_real)[..., None]
    nobody = -1 if pad == "none" else 0
    return jnp.where(is_real, as_ids(topk_idx), nobody), jnp.where(is_real, topk_weights, 0)


def _is_tracked(axes: tuple[str, ...]) -> bool:
    """Whether shard_map(check_vma=True) tracks on which axes a value differs."""
    return {*axes} <= varying_axes(lax.axis_index(axes))


def _split(x: Array, axes: tuple[str, ...], dim: int) -> Array:
    """This rank's part of x. Where x is known to be the same on all ranks its gradient is a gather.

    Elsewhere it is JAX's own: the part in a sea of zeros, for shard_map to sum over the ranks.
    """
    size, num_ranks, is_tracked = x.shape[dim], lax.axis_size(axes), _is_tracked(axes)
    part = -(-size // num_ranks)

    def take(x: Array) -> Array:
        x = vary(_pad(x, dim, part * num_ranks), axes if is_tracked else ())
        start = lax.axis_index(axes) * part
        return lax.dynamic_slice_in_dim(x, start, part, dim, allow_negative_indices=False)

    if not is_tracked or not jnp.issubdtype(x.dtype, jnp.inexact):
        return take(x)
    split = jax.custom_vjp(take)
    split.defvjp(lambda x: (take(x), None), lambda _, dlocal: (_merge(dlocal, axes, dim, size),))
    return split(x)


def _merge(local: Array, axes: tuple[str, ...], dim: int, size: int) -> Array:
    """The parts of all ranks, the first `size` tokens of them, moved as bits.

    The gradient of a value that all ranks hold is the same on all of them where JAX knows of it
    (check_vma=True): each takes its part. Elsewhere it is the sum over the ranks: a reduce-scatter.
    """
    if local.size == 0:  # XLA refuses to gather nothing
        shape = [size if i == dim else local.shape[i] for i in range(local.ndim)]
        return vary(jnp.asarray(np.zeros(shape, local.dtype)), varying_axes(local) - {*axes})
    is_tracked, dtype = _is_tracked(axes), local.dtype
    num_rows = lax.axis_size(axes) * local.shape[dim]

    def gather(local: Array) -> Array:
        bits = lax.bitcast_convert_type(local, bits_dtype(dtype))
        to = "invarying" if is_tracked else "varying"
        bits = lax.all_gather(bits, axes, axis=dim, tiled=True, to=to)
        return lax.bitcast_convert_type(_cut(bits, dim, size), dtype)

    def pull(_: None, dwhole: Array) -> tuple[Array]:
        if is_tracked:
            return (_split(dwhole, axes, dim),)
        dwhole = _pad(dwhole, dim, num_rows)
        return (lax.psum_scatter(dwhole, axes, scatter_dimension=dim, tiled=True),)

    local = vary(local, axes if is_tracked else ())
    if not jnp.issubdtype(dtype, jnp.inexact):
        return gather(local)
    merge = jax.custom_vjp(gather)
    merge.defvjp(lambda local: (gather(local), None), pull)
    return merge(local)


def _pad(x: Array, dim: int, size: int) -> Array:
    """x with zero bytes up to `size`, also in types without a zero (e8m0 scales)."""
    if x.shape[dim] == size:
        return x
    zero = jnp.asarray(np.zeros((), x.dtype))
    return lax.pad(x, zero, [(0, size - n if i == dim else 0, 0) for i, n in enumerate(x.shape)])


def _cut(x: Array, dim: int, size: int) -> Array:
    return x if x.shape[dim] == size else lax.slice_in_dim(x, 0, size, axis=dim)


# Checks.


def _common_size(op: str, name: str, leaves: list[Array], dim: int) -> int:
    """The size of dimension dim, which all arrays must share."""
    shapes = [leaf.shape for leaf in leaves]
    sizes = {shape[dim] if 0 <= dim < len(shape) else None for shape in shapes}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(
            f"jax_moe_ep.{op}: {name} must hold arrays with the same number of tokens in dimension "
            f"{dim}, got shapes {shapes}. Say with dim (from 0) where the tokens are"
        )
    return cast("int", sizes.pop())


def _check_replicated(leaves: list[Array], axes: tuple[str, ...]) -> None:
    for leaf in leaves:
        if differs := sorted(varying_axes(leaf) & {*axes}):
            raise ValueError(
                f"jax_moe_ep.split_tokens: x must be the same on all ranks of axes {axes}, but "
                f"{jax.typeof(leaf)} varies along {differs}, so each rank would take tokens of "
                "another array. Make it with merge_tokens or all_gather(..., to='invarying')"
            )


def _check_routing(topk_idx: Any, topk_weights: Any, is_real: Any) -> None:
    shape = jnp.shape(topk_idx)
    check_integers("mask_routing", "topk_idx", topk_idx)
    if not jnp.issubdtype(jnp.result_type(topk_weights), jnp.floating):
        raise TypeError(
            "jax_moe_ep.mask_routing: topk_weights must be floating, got "
            f"{jnp.result_type(topk_weights)}"
        )
    if jnp.result_type(is_real) != jnp.bool_:
        raise TypeError(
            f"jax_moe_ep.mask_routing: is_real must be bool, got {jnp.result_type(is_real)}"
        )
    if not shape or jnp.shape(topk_weights) != shape:
        raise ValueError(
            "jax_moe_ep.mask_routing: topk_idx and topk_weights must both be [..., K], got shapes "
            f"{shape} and {jnp.shape(topk_weights)}"
        )
    tokens, mask = shape[:-1], jnp.shape(is_real)
    if not mask or len(mask) > len(tokens) or tokens[-len(mask) :] != mask:
        raise ValueError(
            f"jax_moe_ep.mask_routing: is_real must have the shape of the tokens, {tokens}, or the "
            f"end of it, got {mask}. Mask a batch [B, P, K] before it becomes [B*P, K]"
        )
