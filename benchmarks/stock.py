"""dispatch and combine as stock JAX can write them between GPUs, each in the form that is fastest.

All run inside shard_map on one rank's shard. Index arrays that depend on the routing alone are made
before (`StockPlan`), so that their time is not counted.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

import jax_moe_ep as ep

AXIS = "expert"

# lax.ragged_all_to_all, or what tests put in its place.
Transport = Callable[..., Array]


class StockPlan(NamedTuple):
    """What the stock forms know of a routing.

    plan: ours, whose rows they fill.
    assignments: [C] the assignment of the group, token * K + k, that each row holds, or -1.
    sources: [C] the token of the group that each row holds, or -1.
    outgoing: [R, T] for each rank, my tokens that have a row there, first to last; what follows
      them is any other token.
    landing: [C] the place of each row's token in what all ranks have sent me, R times T, or -1.
    incoming: [R, T] for each rank, those of its tokens that have a row here, first to last; what
      follows them is any other of its tokens.
    returning: [R, T] the place of each rank's partial of my tokens in what all ranks have sent me,
      R times T, or -1.
    by_expert: [T*K] my tokens in the order of their experts.
    expert_place: [T, K] the place of my assignments in that order.
    ragged, ragged_back: the sizes and offsets of `lax.ragged_all_to_all` for dispatch and for
      combine, one update a peer and one an expert.
    """

    plan: ep.Plan
    assignments: Int32[Array, "C"]
    sources: Int32[Array, "C"]
    outgoing: Int32[Array, "R T"]
    landing: Int32[Array, "C"]
    incoming: Int32[Array, "R T"]
    returning: Int32[Array, "R T"]
    by_expert: Int32[Array, "TK"]
    expert_place: Int32[Array, "T K"]
    ragged: dict[str, tuple[Int32[Array, "N"], ...]]
    ragged_back: dict[str, tuple[Int32[Array, "N"], ...]]


def stock_plan(ids: Int32[Array, "T K"], plan: ep.Plan) -> StockPlan:
    num_tokens = plan.num_tokens
    assignments = ep.row_sources(plan)
    sources = jnp.where(assignments >= 0, assignments // plan.top_k, -1)
    ranks = jnp.arange(plan.num_ranks, dtype=jnp.int32)[:, None, None]
    leaves_for = (plan.owners == ranks).any(-1)  # [R, T]
    arrives = (plan.slots >= 0).any(-1).reshape(plan.num_ranks, num_tokens)
    order = jnp.argsort(ids.reshape(-1), stable=True)
    return StockPlan(
        plan=plan,
        assignments=assignments,
        sources=sources,
        outgoing=_first(leaves_for),
        landing=jnp.where(sources >= 0, _places(arrives).reshape(-1)[sources], -1),
        incoming=_first(arrives),
        returning=_places(leaves_for),
        by_expert=(order // plan.top_k).astype(jnp.int32),
        expert_place=jnp.argsort(order).reshape(ids.shape).astype(jnp.int32),
        ragged={
            "peer": _sizes_by_peer(leaves_for, arrives),
            "expert": _sizes_by_expert(plan),
        },
        ragged_back={
            "peer": _sizes_by_peer(arrives, leaves_for),
            "expert": _sizes_back_by_expert(plan),
        },
    )


def _first(chosen: Bool[Array, "R T"]) -> Int32[Array, "R T"]:
    """The chosen tokens of each row before the others."""
    return jnp.argsort(~chosen, axis=1, stable=True).astype(jnp.int32)


def _places(chosen: Bool[Array, "R T"]) -> Int32[Array, "R T"]:
    """Where a token is if each row's chosen ones are packed at the start of its T places, or -1."""
    num_ranks, num_tokens = chosen.shape
    starts = jnp.arange(num_ranks, dtype=jnp.int32)[:, None] * num_tokens
    return jnp.where(chosen, starts + jnp.cumsum(chosen, 1, dtype=jnp.int32) - 1, -1)


def _sizes_by_peer(leaves: Bool[Array, "R T"], arrives: Bool[Array, "R T"]) -> Any:
    num_ranks, num_tokens = leaves.shape
    starts = jnp.arange(num_ranks, dtype=jnp.int32) * num_tokens
    mine = jnp.full(num_ranks, lax.axis_index(AXIS) * num_tokens, jnp.int32)
    sent, received = (x.sum(1, dtype=jnp.int32) for x in (leaves, arrives))
    return starts, sent, mine, received


def _sizes_by_expert(plan: ep.Plan) -> Any:
    me = lax.axis_index(AXIS)
    counts = lax.all_gather(plan.source_counts, AXIS)  # [R of experts, R of sources, L]
    starts = lax.all_gather(plan.group_starts, AXIS)  # [R, L]
    sent = counts[:, me].reshape(-1)
    is_before = (jnp.arange(plan.num_ranks) < me)[:, None]
    there = starts + jnp.where(is_before, counts, 0).sum(1, dtype=jnp.int32)
    return _exclusive_sum(sent), sent, there.reshape(-1), plan.source_counts.reshape(-1)


def _sizes_back_by_expert(plan: ep.Plan) -> Any:
    """The same updates, the other way."""
    me = lax.axis_index(AXIS)
    counts = lax.all_gather(plan.source_counts, AXIS)  # [R of experts, R of sources, L]
    here = plan.group_starts + _exclusive_sum(plan.source_counts)  # over sources
    places = _exclusive_sum(counts.swapaxes(0, 1).reshape(plan.num_ranks, -1), 1)  # [R, E]
    there = places.reshape(plan.num_ranks, plan.num_ranks, -1)[:, me]
    sent, received = plan.source_counts.reshape(-1), counts[:, me].reshape(-1)
    return here.reshape(-1), sent, there.reshape(-1), received


def _exclusive_sum(values: Int32[Array, "..."], axis: int = 0) -> Int32[Array, "..."]:
    return (jnp.cumsum(values, axis) - values).astype(jnp.int32)


# dispatch: rows [C, H], zero where no token is.


def gathered(x: Float[Array, "T H"], stock: StockPlan) -> Float[Array, "C H"]:
    everywhere = lax.all_gather(x, AXIS, tiled=True)
    return _rows(everywhere, stock.sources)


def padded(x: Float[Array, "T H"], stock: StockPlan) -> Float[Array, "C H"]:
    """Each pair of ranks has room for all tokens, as nothing may be dropped."""
    landed = lax.all_to_all(x[stock.outgoing], AXIS, split_axis=0, concat_axis=0)
    return _rows(landed.reshape(-1, x.shape[1]), stock.landing)


def ragged_by_peer(
    x: Float[Array, "T H"], stock: StockPlan, transport: Transport = lax.ragged_all_to_all
) -> Float[Array, "C H"]:
    """Each token once a peer, then a local gather, as MaxText does (AI-Hypercomputer/maxtext)."""
    packed = x[stock.outgoing].reshape(-1, x.shape[1])
    landed = transport(packed, jnp.zeros_like(packed), *stock.ragged["peer"], axis_name=AXIS)
    return _rows(landed, stock.landing)


def ragged_by_expert(
    x: Float[Array, "T H"], stock: StockPlan, transport: Transport = lax.ragged_all_to_all
) -> Float[Array, "C H"]:
    """Each token once an expert, straight to its rows."""
    rows = jnp.zeros((stock.sources.size, x.shape[1]), x.dtype)
    return transport(x[stock.by_expert], rows, *stock.ragged["expert"], axis_name=AXIS)


def _rows(tokens: Float[Array, "N H"], index: Int32[Array, "C"]) -> Float[Array, "C H"]:
    return jnp.where(index[:, None] >= 0, tokens[index], 0)


# combine: tokens [T, H].


def scattered(
    y: Float[Array, "C H"], weights: Float[Array, "T K"], stock: StockPlan
) -> Float[Array, "T H"]:
    partial = _partial(y, weights, stock)
    return lax.psum_scatter(partial, AXIS, scatter_dimension=0, tiled=True).astype(y.dtype)


def scattered_narrow(
    y: Float[Array, "C H"], weights: Float[Array, "T K"], stock: StockPlan
) -> Float[Array, "T H"]:
    """Partials cross in y's dtype, as those of ep.combine do."""
    partial = _partial(y, weights, stock).astype(y.dtype)
    return lax.psum_scatter(partial, AXIS, scatter_dimension=0, tiled=True)


def returned(
    y: Float[Array, "C H"], weights: Float[Array, "T K"], stock: StockPlan
) -> Float[Array, "T H"]:
    partial = _partial(y, weights, stock).astype(y.dtype)
    partial = partial.reshape(stock.plan.num_ranks, stock.plan.num_tokens, -1)
    landed = lax.all_to_all(partial, AXIS, split_axis=0, concat_axis=0)
    return landed.sum(0, dtype=jnp.float32).astype(y.dtype)


def ragged_back_by_peer(
    y: Float[Array, "C H"],
    weights: Float[Array, "T K"],
    stock: StockPlan,
    transport: Transport = lax.ragged_all_to_all,
) -> Float[Array, "T H"]:
    """One partial a token and rank that has rows of it."""
    num_ranks, num_tokens = stock.incoming.shape
    partial = _partial(y, weights, stock).astype(y.dtype)
    packed = partial[(stock.incoming + num_tokens * jnp.arange(num_ranks)[:, None]).reshape(-1)]
    landed = transport(packed, jnp.zeros_like(packed), *stock.ragged_back["peer"], axis_name=AXIS)
    partials = landed[stock.returning].astype(jnp.float32)
    return jnp.where(stock.returning[..., None] >= 0, partials, 0).sum(0).astype(y.dtype)


def ragged_back_by_expert(
    y: Float[Array, "C H"],
    weights: Float[Array, "T K"],
    stock: StockPlan,
    transport: Transport = lax.ragged_all_to_all,
) -> Float[Array, "T H"]:
    """Every row straight back, then a sum of K rows a token."""
    rows = jnp.zeros((stock.by_expert.size, y.shape[1]), y.dtype)
    landed = transport(y, rows, *stock.ragged_back["expert"], axis_name=AXIS)
    scaled = landed[stock.expert_place].astype(jnp.float32) * weights[..., None]
    return scaled.sum(1).astype(y.dtype)


def _partial(
    y: Float[Array, "C H"], weights: Float[Array, "T K"], stock: StockPlan
) -> Float[Array, "G H"]:
    """What my rows add to every token of the group, in fp32."""
    slots = stock.plan.slots
    weights = lax.all_gather(weights, AXIS, tiled=True)
    scaled = y[slots].astype(jnp.float32) * weights[..., None]
    return jnp.where(slots[..., None] >= 0, scaled, 0).sum(1)


# Their gradients.


def with_gradients(
    scatter: Callable[..., Array], gather: Callable[..., Array]
) -> tuple[Callable[..., Array], Callable[..., Array]]:
    """dispatch and combine whose backward passes are written with each other's forms: what
    jax.vjp makes of a gather is a scatter-add, several times as slow."""

    def ones(maps: StockPlan) -> Array:
        return jnp.ones((maps.plan.num_tokens, maps.plan.top_k))

    def dispatch_backward(maps: StockPlan, drows: Array) -> tuple[Array, None]:
        return gather(drows, ones(maps), maps), None

    def combine_backward(residuals: Any, dout: Array) -> tuple[Array, Array, None]:
        y, weights, maps = residuals
        rows = scatter(dout, maps).astype(jnp.float32)
        of_rows = lax.all_gather(weights, AXIS, tiled=True).reshape(-1)[maps.assignments]
        is_live = maps.assignments >= 0
        dy = jnp.where(is_live[:, None], rows * of_rows[:, None], 0).astype(y.dtype)
        slots = maps.plan.slots
        dots = jnp.where(slots >= 0, (rows * y.astype(jnp.float32)).sum(-1)[slots], 0)
        dweights = lax.psum_scatter(dots, AXIS, scatter_dimension=0, tiled=True)
        return dy, dweights, None

    dispatch, combine = jax.custom_vjp(scatter), jax.custom_vjp(gather)
    dispatch.defvjp(lambda x, maps: (scatter(x, maps), maps), dispatch_backward)
    combine.defvjp(lambda *args: (gather(*args), args), combine_backward)
    return dispatch, combine


Forms = dict[str, dict[str, Callable[..., Any]]]

FORMS: Forms = {
    "dispatch": {"all_gather, gather": gathered, "all_to_all, gather": padded},
    "combine": {
        "sum, psum_scatter": scattered,
        "sum, psum_scatter in bf16": scattered_narrow,
        "sum, all_to_all": returned,
    },
}
RAGGED: Forms = {
    "dispatch": {
        "ragged_all_to_all by peer, gather": ragged_by_peer,
        "ragged_all_to_all by expert": ragged_by_expert,
    },
    "combine": {
        "sum, ragged_all_to_all by peer": ragged_back_by_peer,
        "ragged_all_to_all by expert, sum": ragged_back_by_expert,
    },
}


def largest_difference(actual: jax.Array, expected: jax.Array) -> Float[Array, ""]:
    """On this rank, relative to the largest value; infinite if there is NaN."""
    actual, expected = actual.astype(jnp.float32), expected.astype(jnp.float32)
    difference = jnp.abs(actual - expected).max() / jnp.abs(expected).max(initial=1e-30)
    return jnp.where(jnp.isnan(difference), jnp.inf, difference)
