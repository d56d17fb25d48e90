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

    sources: [C] the token of the group that each row holds, or -1.
    outgoing: [R, T] for each rank, my tokens that have a row there, first to last; what follows
      them is any other token.
    landing: [C] the place of each row's token in what all ranks have sent me, R times T, or -1.
    by_expert: [T*K] my tokens in the order of their experts.
    ragged: the sizes and offsets of `lax.ragged_all_to_all`, one update a peer and one an expert.
    """

    sources: Int32[Array, "C"]
    outgoing: Int32[Array, "R T"]
    landing: Int32[Array, "C"]
    by_expert: Int32[Array, "TK"]
    ragged: dict[str, tuple[Int32[Array, "N"], ...]]


def stock_plan(ids: Int32[Array, "T K"], plan: ep.Plan) -> StockPlan:
    num_tokens = plan.num_tokens
    sources = ep.row_sources(plan)
    sources = jnp.where(sources >= 0, sources // plan.top_k, -1)
    ranks = jnp.arange(plan.num_ranks, dtype=jnp.int32)[:, None, None]
    leaves_for = (plan.owners == ranks).any(-1)  # [R, T]
    arrives = (plan.slots >= 0).any(-1).reshape(plan.num_ranks, num_tokens)
    place = jnp.arange(plan.num_ranks)[:, None] * num_tokens + jnp.cumsum(arrives, 1) - 1
    return StockPlan(
        sources=sources,
        outgoing=jnp.argsort(~leaves_for, axis=1, stable=True).astype(jnp.int32),
        landing=jnp.where(sources >= 0, place.reshape(-1)[sources], -1).astype(jnp.int32),
        by_expert=(jnp.argsort(ids.reshape(-1), stable=True) // plan.top_k).astype(jnp.int32),
        ragged={
            "peer": _sizes_by_peer(leaves_for, arrives),
            "expert": _sizes_by_expert(plan),
        },
    )


def _sizes_by_peer(leaves_for: Bool[Array, "R T"], arrives: Bool[Array, "R T"]) -> Any:
    num_ranks, num_tokens = leaves_for.shape
    starts = jnp.arange(num_ranks, dtype=jnp.int32) * num_tokens
    mine = jnp.full(num_ranks, lax.axis_index(AXIS) * num_tokens, jnp.int32)
    sent, received = (x.sum(1, dtype=jnp.int32) for x in (leaves_for, arrives))
    return starts, sent, mine, received


def _sizes_by_expert(plan: ep.Plan) -> Any:
    me = lax.axis_index(AXIS)
    counts = lax.all_gather(plan.source_counts, AXIS)  # [R of experts, R of sources, L]
    starts = lax.all_gather(plan.group_starts, AXIS)  # [R, L]
    sent = counts[:, me].reshape(-1)
    is_before = (jnp.arange(plan.num_ranks) < me)[:, None]
    there = starts + jnp.where(is_before, counts, 0).sum(1, dtype=jnp.int32)
    here = (jnp.cumsum(sent) - sent).astype(jnp.int32)
    return here, sent, there.reshape(-1), plan.source_counts.reshape(-1)


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
    y: Float[Array, "C H"], plan: ep.Plan, weights: Float[Array, "T K"]
) -> Float[Array, "T H"]:
    partial = _partial(y, plan, weights)
    return lax.psum_scatter(partial, AXIS, scatter_dimension=0, tiled=True).astype(y.dtype)


def scattered_narrow(
    y: Float[Array, "C H"], plan: ep.Plan, weights: Float[Array, "T K"]
) -> Float[Array, "T H"]:
    """Partials cross in y's dtype, as those of ep.combine do."""
    partial = _partial(y, plan, weights).astype(y.dtype)
    return lax.psum_scatter(partial, AXIS, scatter_dimension=0, tiled=True)


def returned(
    y: Float[Array, "C H"], plan: ep.Plan, weights: Float[Array, "T K"]
) -> Float[Array, "T H"]:
    partial = _partial(y, plan, weights).astype(y.dtype)
    partial = partial.reshape(plan.num_ranks, plan.num_tokens, -1)
    landed = lax.all_to_all(partial, AXIS, split_axis=0, concat_axis=0)
    return landed.sum(0, dtype=jnp.float32).astype(y.dtype)


def _partial(
    y: Float[Array, "C H"], plan: ep.Plan, weights: Float[Array, "T K"]
) -> Float[Array, "G H"]:
    """What my rows add to every token of the group, in fp32."""
    weights = lax.all_gather(weights, AXIS, tiled=True)
    scaled = y[plan.slots].astype(jnp.float32) * weights[..., None]
    return jnp.where(plan.slots[..., None] >= 0, scaled, 0).sum(1)


FORMS: dict[str, dict[str, Callable[..., Any]]] = {
    "dispatch": {"all_gather, gather": gathered, "all_to_all, gather": padded},
    "combine": {
        "sum, psum_scatter": scattered,
        "sum, psum_scatter in bf16": scattered_narrow,
        "sum, all_to_all": returned,
    },
}
RAGGED: dict[str, Callable[..., Any]] = {
    "ragged_all_to_all by expert": ragged_by_expert,
    "ragged_all_to_all by peer, gather": ragged_by_peer,
}


def largest_difference(actual: jax.Array, expected: jax.Array) -> Float[Array, ""]:
    """On this rank, relative to the largest value; infinite if there is NaN."""
    actual, expected = actual.astype(jnp.float32), expected.astype(jnp.float32)
    difference = jnp.abs(actual - expected).max() / jnp.abs(expected).max(initial=1e-30)
    return jnp.where(jnp.isnan(difference), jnp.inf, difference)
