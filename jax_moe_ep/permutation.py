"""Sorting rows on one rank: by expert, and by chunks. No mesh, no communication.

These are plan, dispatch and combine of a group of one (`axis_name=()`), so the kernels and the
gradients are theirs. Arrays that are sharded over an Explicit mesh go through jax.shard_map.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int32, PyTree, Shaped

from jax_moe_ep import ops
from jax_moe_ep.checks import check_chunks, check_ids, check_leaves, check_no_group
from jax_moe_ep.config import EpConfig, Implementation, Tail
from jax_moe_ep.plan import Plan


def permute(
    x: PyTree[Shaped[Array, "T ..."]],
    topk_idx: Int[Array, "T K"],
    num_experts: int,
    *,
    alignment: int = 1,
    capacity: int | float | None = None,
    tail: Tail = "zero",
    implementation: Implementation = "auto",
) -> tuple[PyTree[Shaped[Array, "C ..."]], Plan]:
    """Copies every token to the rows of its experts, grouped by expert.

    `plan = ep.plan(topk_idx, config); rows = ep.dispatch(x, plan)` with axis_name=() and
    distinct_experts=False, so that without a capacity duplicates fit too and nothing is dropped.

    Args:
      x: [T, ...] tokens of any dtype, or a pytree of such arrays.
      topk_idx: [T, K] int32 or int64; ids outside [0, E) are "no expert".
      num_experts: E.
      alignment, capacity, tail, implementation: as in `EpConfig`. Its other options are for plan
        and dispatch themselves.

    Returns:
      rows [C, ...], and the Plan: `group_sizes` is what a grouped GEMM takes, and
      `row_sources(plan)` [C] are the indices t*K + k of the rows, -1 where there is none.

    Differentiable in the floating leaves of x: the gradient is `unpermute` without weights.

    Raises:
      TypeError, ValueError: for a wrong shape, dtype or option.

    Example:
      >>> import jax.numpy as jnp, jax_moe_ep as ep
      >>> x = jnp.array([[5, 5, 5, 5], [7, 7, 7, 7]])
      >>> rows, plan = ep.permute(x, jnp.array([[1, 0], [1, -1]]), 2)
      >>> rows[:, 0].tolist(), plan.group_sizes.tolist()
      ([5, 5, 7, 0], [1, 2])
      >>> ep.row_sources(plan).tolist()
      [1, 0, 2, -1]
    """
    check_ids("permute", topk_idx)
    check_leaves("permute", x, jnp.shape(topk_idx)[0], "T", "topk_idx")
    config = EpConfig(
        num_experts,
        (),
        alignment=alignment,
        capacity=capacity,
        distinct_experts=False,
        tail=tail,
        implementation=implementation,
    )
    plan = ops.plan(topk_idx, config)
    return ops.dispatch(x, plan), plan


def unpermute(
    rows: Float[Array, "C ..."], plan: Plan, topk_weights: Float[Array, "T K"] | None = None
) -> Float[Array, "T ..."]:
    """Brings the rows of `permute` back and sums them for every token: `ep.combine`.

    Args:
      rows: [C, ...] floating, at most 32 bits. Padding and tail are never read.
      plan: the Plan of `permute`.
      topk_weights: [T, K] floating, or None for a plain sum.

    Returns:
      [T, ...] in the dtype of rows, summed in float32 in the order of k; +0 for a token without
      rows.

    Differentiable in rows and topk_weights, once.

    Raises:
      TypeError, ValueError: for a wrong shape or dtype, or the plan of a group with a mesh axis.

    Example:
      >>> import jax.numpy as jnp, jax_moe_ep as ep
      >>> x = jnp.array([[5.0, 5.0, 5.0, 5.0], [7.0, 7.0, 7.0, 7.0]])
      >>> rows, plan = ep.permute(x, jnp.array([[1, 0], [1, -1]]), 2)
      >>> ep.unpermute(rows, plan)[:, 0].tolist()
      [10.0, 7.0]
    """
    check_no_group("unpermute", plan)
    return ops.combine_for("unpermute", "rows", rows, plan, topk_weights)


def sort_chunks(
    x: PyTree[Shaped[Array, "N ..."]],
    chunk_sizes: Int[Array, "M"],
    order: Int[Array, "M"],
    *,
    tail: Tail = "zero",
    implementation: Implementation = "auto",
) -> tuple[PyTree[Shaped[Array, "N ..."]], Int32[Array, "M"]]:
    """Reorders consecutive chunks of rows: chunk order[0] first, then order[1], and so on.

    `chunks = split(x, cumsum(chunk_sizes)); concatenate([chunks[m] for m in order])`, in arrays
    of static size: rows beyond the sum of the sizes are a tail on both sides.

    Args:
      x: [N, ...] rows of any dtype, or a pytree of such arrays.
      chunk_sizes: [M] int32 or int64. A negative size counts as 0. Where the sizes exceed N, the
        chunks end at row N: the last ones are cut short, which shows in the sizes returned.
      order: [M] int32 or int64, a permutation of 0 to M - 1. Rank-major chunks [R, L] become
        expert-major with `arange(R * L).reshape(R, L).T.reshape(-1)`. With another order the rows
        are undefined, but nothing is read or written out of bounds.
      tail, implementation: as in `EpConfig`.

    Returns:
      The rows [N, ...] in their new order, and the sizes [M] of the chunks in this order,
      int32: with them, `sort_chunks(rows, sizes, argsort(order))` is the inverse.

    Differentiable in the floating leaves of x: each row gets the gradient of its new place, the
    tail 0.

    Raises:
      TypeError, ValueError: for a wrong shape, dtype or option.

    Example:
      >>> import jax.numpy as jnp, jax_moe_ep as ep
      >>> x = jnp.arange(16).reshape(4, 4)
      >>> rows, sizes = ep.sort_chunks(x, jnp.array([1, 2]), jnp.array([1, 0]))
      >>> rows[:, 0].tolist(), sizes.tolist()
      ([4, 8, 0, 0], [2, 1])

    After `sort_chunks_by_idxs` in NVIDIA/Megatron-LM, megatron/core/transformer/moe/moe_utils.py.
    """
    check_chunks(chunk_sizes, order)
    leaves = jax.tree.leaves(x)
    num_rows = jnp.shape(leaves[0])[0] if leaves and jnp.ndim(leaves[0]) else 0
    check_leaves("sort_chunks", x, num_rows, "N", "the first leaf")
    config = EpConfig(1, (), tail=tail, implementation=implementation)
    ends, order = _ends(chunk_sizes, num_rows), jnp.asarray(order)
    sizes = ends - jnp.append(0, ends[:-1]).astype(jnp.int32)
    plan = _plan_of_chunks(sizes, order, num_rows, config)
    return ops.dispatch(x, plan), sizes[order]


def _ends(sizes: Int[Array, "M"], num_rows: int) -> Int32[Array, "M"]:
    """The ends of the chunks, at most N. Saturating sums: no size is too large for them."""
    # In their own type: JAX would cut int64 of NumPy's off. Two of them then stay below 2^32.
    sizes = jnp.asarray(sizes.clip(0, num_rows), jnp.uint32)
    ends = lax.associative_scan(lambda a, b: jnp.minimum(a + b, jnp.uint32(num_rows)), sizes)
    return ends.astype(jnp.int32)


def _plan_of_chunks(
    sizes: Int32[Array, "M"], order: Int[Array, "M"], num_rows: int, config: EpConfig
) -> Plan:
    """The plan of one expert whose rows are the chunks in their order, K = 1."""
    starts = jnp.cumsum(sizes, dtype=jnp.int32) - sizes
    sorted_starts = jnp.cumsum(sizes[order], dtype=jnp.int32) - sizes[order]
    move = jnp.zeros_like(sizes).at[order].set(sorted_starts) - starts
    row = jnp.arange(num_rows, dtype=jnp.int32)
    target = row + jnp.repeat(move, sizes, total_repeat_length=num_rows)
    total = sizes.sum(dtype=jnp.int32)
    is_moved = (row < total) & (target >= 0) & (target < num_rows)
    slots = jnp.where(is_moved, target, -1)[:, None]
    counts = total[None]
    return Plan(
        slots=slots,
        owners=jnp.where(slots >= 0, 0, -1),
        group_counts=counts,
        group_sizes=counts,
        group_starts=jnp.zeros_like(counts),
        source_counts=counts[None],
        num_assignments=total,
        num_dropped=jnp.zeros_like(total),
        required_rows=total,
        config=config,
        num_ranks=1,
        num_tokens=num_rows,
        capacity=num_rows,
    )
