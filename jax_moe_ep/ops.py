"""The public ops: checks, gradients, and names for `jax.checkpoint`.

All of them run inside `jax.shard_map` on one rank's shard, or anywhere with `axis_name=()`. The
letters are those of `Plan`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Int32, PyTree, Shaped

from jax_moe_ep import maps, reference
from jax_moe_ep.checks import (
    check_axes,
    check_first_size,
    check_group,
    check_plan,
    check_priority,
    check_routing,
    check_sizes,
    check_summed,
    check_weights,
)
from jax_moe_ep.config import EpConfig
from jax_moe_ep.ids import as_ids
from jax_moe_ep.implementation import choose
from jax_moe_ep.plan import Plan, Stats
from jax_moe_ep.varying import vary, varying_axes


def plan(
    topk_idx: Int[Array, "T K"] | Bool[Array, "T E"],
    config: EpConfig,
    *,
    priority: Float[Array, "T KE"] | None = None,
    top_k: int | None = None,
) -> Plan:
    """Decides the receive row of every assignment of the group.

    Every rank gathers the ids of all ranks and counts the rows of all E experts. Rows are in the
    order (local expert, source rank, source token, k); `Plan` says what the arrays hold and
    `EpConfig` which rows stay when there are too many.

    Args:
      topk_idx: [T, K] int32 or int64, the experts of my tokens. Ids outside [0, E) are "no
        expert"; an expert named twice by one token gets two rows. Or a routing map [T, E] bool,
        taken as the ids of `dense_to_topk`.
      config: the options of the group.
      priority: floating in the shape of topk_idx, needed with drop_policy="priority" and refused
        without: which rows stay, highest first.
      top_k: K, needed with a routing map and refused with ids. A token's experts beyond its first
        K, by index, are dropped, and counted in num_assignments and num_dropped.

    Returns:
      The Plan. Integers only: no gradient flows through it.

    Raises:
      TypeError, ValueError: for a wrong shape, dtype or option, or outside shard_map.

    Example:
      >>> import jax, jax_moe_ep as ep
      >>> from jax.sharding import PartitionSpec as P
      >>> config = ep.EpConfig(num_experts=4, axis_name="expert")
      >>> mesh = jax.make_mesh((1,), ("expert",))
      >>> ids = jax.numpy.array([[2, 0], [2, -1]])
      >>> counts = lambda ids: ep.plan(ids, config).group_counts
      >>> jax.shard_map(counts, mesh=mesh, in_specs=P(), out_specs=P("expert"))(ids)
      Array([1, 0, 2, 0], dtype=int32)
    """
    size = check_group("plan", config)
    check_routing(topk_idx, config, top_k)
    check_priority(priority, topk_idx, config)
    cut = None
    if top_k is not None:
        topk_idx, priority, cut = maps.assignments_of_map(topk_idx, priority, top_k)
    check_sizes(topk_idx.shape, config, size)
    ids = as_ids(topk_idx, jnp.int32)
    if priority is not None:
        priority = lax.stop_gradient(priority).astype(jnp.float32)
    ids, priority = vary((ids, priority), config.axes)
    run = reference.plan if ids.shape[0] == 0 else choose("plan", config)
    result = run(ids, priority, config=config)
    if cut is not None:
        result = maps.count_cut(result, cut)
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, "ep_plan"), result)


def dispatch(x: PyTree[Shaped[Array, "T ..."]], plan: Plan) -> PyTree[Shaped[Array, "C ..."]]:
    """Sends every token to the rows of its experts.

    On each rank, with x_all the tokens of all ranks and s = row_sources(plan):
    `rows = where(s >= 0, x_all[s // K], 0)`. Data only moves: the bits are those of x.

    Args:
      x: [T, ...] my tokens, any dtype, or a pytree of such arrays (data with its scales, say).
      plan: the Plan of the batch.

    Returns:
      [C, ...] rows grouped by local expert, each group aligned; padding rows are zero, the tail
      after the last group as `EpConfig.tail` says.

    Differentiable in the floating leaves of x of at most 32 bits, and complex ones of 64: the
    gradient is `combine` without weights.

    Raises:
      TypeError, ValueError: for leaves whose first size is not T, or a foreign plan.
      NotImplementedError: on CUDA for bools, and rows of no multiple of 16 bytes.
    """
    check_plan("dispatch", plan)
    leaves, treedef = jax.tree.flatten(jax.tree.map(jnp.asarray, x))
    for leaf in leaves:
        check_first_size("dispatch", "x", leaf, plan.num_tokens, "T")
    moving = tuple(leaf for leaf in leaves if leaf.size)
    if moving:
        moving, plan = vary((moving, plan), plan.config.axes)
        moving = _dispatch(moving, plan)
    moved = iter(moving)
    leaves = [next(moved) if leaf.size else _nothing(leaf, plan.capacity, plan) for leaf in leaves]
    return treedef.unflatten([checkpoint_name(leaf, "ep_rows") for leaf in leaves])


def combine(
    y: Float[Array, "C ..."], plan: Plan, topk_weights: Float[Array, "T K"] | None = None
) -> Float[Array, "T ..."]:
    """Brings the experts' rows back and sums them for every token.

    Each expert's rank sums w[t, k] * y[row] over its own k in order, in fp32 with the product and
    the sum rounded separately, and rounds once to y's dtype. The token's rank sums these partials
    in rank order in fp32 from +0 and rounds once. The same bits on every run.

    Args:
      y: [C, ...] rows, floating, at most 32 bits. Padding and tail are never read.
      plan: the Plan of the batch.
      topk_weights: [T, K] floating, or None for a plain sum. A weight at a place without a row is
        never read.

    Returns:
      [T, ...] in y's dtype; +0 for a token without rows.

    Differentiable in y and topk_weights, once: dy[row] = w * dout[t], dw[t, k] =
    <dout[t], y[row]> in fp32; exact zeros where there is no row.

    Raises:
      TypeError, ValueError: for a wrong shape or dtype, or a foreign plan.
    """
    return combine_for("combine", "y", y, plan, topk_weights)


def combine_for(op: str, name: str, y: Array, plan: Plan, topk_weights: Array | None) -> Array:
    """`combine` with the errors of an op whose rows have that name."""
    check_plan(op, plan)
    y = jnp.asarray(y)
    check_first_size(op, name, y, plan.capacity, "C")
    check_summed(op, name, y)
    if topk_weights is not None:
        topk_weights = jnp.asarray(topk_weights)
        check_weights(op, topk_weights, plan)
    if plan.num_tokens == 0 or y.size == 0:
        return checkpoint_name(_nothing(y, plan.num_tokens, plan), "ep_out")
    y, plan, topk_weights = vary((y, plan, topk_weights), plan.config.axes)
    return checkpoint_name(_combine(y, plan, topk_weights), "ep_out")


def row_weights(topk_weights: Float[Array, "T K"], plan: Plan) -> Float[Array, "C"]:
    """The weight of every row, for experts that apply it themselves.

    Args:
      topk_weights: [T, K] floating.
      plan: the Plan of the batch.

    Returns:
      [C] in the dtype of topk_weights; 0 where there is no live row.

    Differentiable in topk_weights: the gradient of each row goes back to its place.

    Raises:
      TypeError, ValueError: for a wrong shape or dtype, or a foreign plan.
    """
    check_plan("row_weights", plan)
    topk_weights = jnp.asarray(topk_weights)
    check_weights("row_weights", topk_weights, plan)
    if plan.num_tokens == 0 or plan.capacity == 0:
        return _nothing(topk_weights[:, 0], plan.capacity, plan)
    topk_weights, plan = vary((topk_weights, plan), plan.config.axes)
    return _row_weights(topk_weights, plan)


def row_sources(plan: Plan) -> Int32[Array, "C"]:
    """Where every row came from: (source rank * T + token) * K + k, or -1.

    Args:
      plan: the Plan of the batch.

    Returns:
      [C] int32. No gradient.
    """
    check_plan("row_sources", plan)
    return vary((reference.row_sources(plan), plan), plan.config.axes)[0]


def stats(plan: Plan, *, axis_name: str | tuple[str, ...] = ()) -> Stats:
    """Totals over the EP group and over every other mesh axis on which the plan differs.

    Args:
      plan: the Plan of the batch.
      axis_name: further axes to total over. Needed only under shard_map(check_vma=False), which
        hides from the program on which axes a value differs: name the axes that shard the tokens
        beside the EP axis. An axis on which the plan is replicated does not belong here.

    Returns:
      `Stats`, the same on all ranks. No gradient.

    Raises:
      TypeError, ValueError: for a foreign plan, or an axis that is not bound.
    """
    check_plan("stats", plan)
    config = plan.config
    more = check_axes("stats", axis_name)
    axes = tuple(dict.fromkeys((*config.axes, *more, *sorted(varying_axes(plan)))))
    plan = vary(plan, axes)
    me = lax.axis_index(config.axis_name)
    counts = jnp.zeros(config.num_experts, jnp.int32)
    counts = vary(counts, axes)
    start = me * plan.num_local_experts
    counts = lax.dynamic_update_slice_in_dim(counts, plan.group_counts, start, axis=0)
    return Stats(
        num_assignments=lax.psum(plan.num_assignments, axes),
        num_dropped=lax.psum(plan.num_dropped, axes),
        required_rows=lax.pmax(plan.required_rows, axes),
        expert_counts=lax.psum(counts, axes),
    )


def _nothing(like: Array, size: int, plan: Plan) -> Array:
    """The result where nothing moves: zero bytes, also in types without a zero (e8m0 scales)."""
    result = jnp.asarray(np.zeros((size, *like.shape[1:]), like.dtype))
    return vary((result, like, plan), plan.config.axes)[0]


# Gradients.


@jax.custom_vjp
def _dispatch(leaves: tuple[Array, ...], plan: Plan) -> tuple[Array, ...]:
    return choose("dispatch", plan.config)(leaves, plan)


def _dispatch_forward(leaves: tuple[Array, ...], plan: Plan) -> tuple[tuple[Array, ...], Plan]:
    return _dispatch(leaves, plan), plan


def _dispatch_backward(plan: Plan, drows: tuple[Array, ...]) -> tuple[Any, None]:
    def back(leaf: Array) -> Array | None:
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            check_summed("dispatch", "x", leaf.real, "for a gradient, parts of complex ")
            return lax.complex(combine(leaf.real, plan), combine(leaf.imag, plan))
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return None
        check_summed("dispatch", "x", leaf, "for a gradient, ")
        return combine(leaf, plan)

    return tuple(map(back, drows)), None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def _combine(y: Array, plan: Plan, weights: Array | None) -> Array:
    return choose("combine", plan.config)(y, plan, weights)


def _combine_forward(y: Array, plan: Plan, weights: Array | None) -> tuple[Array, Any]:
    # Without weights the gradient is a plain dispatch: y need not be kept.
    return _combine(y, plan, weights), (y if weights is not None else None, plan, weights)


def _combine_backward(residuals: Any, dout: Array) -> tuple[Array, None, Array | None]:
    y, plan, weights = residuals
    if weights is None:
        return dispatch(dout, plan), None, None
    dy, dw = choose("combine_backward", plan.config)(dout, y, plan, weights)
    return dy, None, dw


_combine.defvjp(_combine_forward, _combine_backward)


@jax.custom_vjp
def _row_weights(weights: Array, plan: Plan) -> Array:
    return choose("row_weights", plan.config)(weights, plan)


def _row_weights_forward(weights: Array, plan: Plan) -> tuple[Array, Plan]:
    return _row_weights(weights, plan), plan


def _row_weights_backward(plan: Plan, drow: Array) -> tuple[Array, None]:
    return choose("row_weights_backward", plan.config)(drow, plan), None


_row_weights.defvjp(_row_weights_forward, _row_weights_backward)
