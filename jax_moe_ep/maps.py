"""Routing as top-k ids [T, K] or as a dense map [T, E], and the ways between the two.

Plain JAX on any platform, one rank's tokens at a time: no mesh, no communication.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Shaped

from jax_moe_ep.checks import check_floats, check_ids, check_map, check_num_experts, check_top_k
from jax_moe_ep.ids import as_ids
from jax_moe_ep.plan import Plan
from jax_moe_ep.varying import vary

_WORD_BITS = 32


def topk_to_dense(
    topk_idx: Int[Array, "T K"], topk_weights: Float[Array, "T K"] | None, num_experts: int
) -> tuple[Bool[Array, "T E"], Float32[Array, "T E"] | None]:
    """The experts of every token as a mask over all experts, with their weights as probs.

    `routing_map[t, topk_idx[t, k]] = True` and `probs[t, topk_idx[t, k]] += topk_weights[t, k]`
    for every k in order, from False and +0. An expert named twice is one True, so a map forgets
    duplicates; their weights are summed.

    Args:
      topk_idx: [T, K] int32 or int64. Ids outside [0, E) contribute nothing, nor do their weights.
      topk_weights: [T, K] floating, or None. Used in float32.
      num_experts: E.

    Returns:
      routing_map [T, E] bool, and probs [T, E] float32 or None.

    Differentiable in topk_weights any number of times in reverse mode: each place gets the
    gradient of its expert's prob, duplicates the same one; a place without an expert exactly 0.

    Raises:
      TypeError, ValueError: for a wrong shape, dtype or num_experts.

    Example:
      >>> import jax.numpy as jnp, jax_moe_ep as ep
      >>> weights = jnp.array([[0.5, 0.25, 0.125]])
      >>> routing_map, probs = ep.topk_to_dense(jnp.array([[2, 0, -1]]), weights, 4)
      >>> routing_map.tolist(), probs.tolist()
      ([[True, False, True, False]], [[0.25, 0.0, 0.5, 0.0]])

    Named `indices_to_map` in deepseek-ai/DeepEP (branch hybrid-ep), deep_ep/hybrid_ep_buffer.py.
    """
    check_ids("topk_to_dense", topk_idx)
    check_num_experts("topk_to_dense", num_experts)
    topk_idx = as_ids(topk_idx)
    # One expression over [T, E] per k, which the compiler fuses into one pass: no [T, K, E].
    routing_map = jnp.zeros((topk_idx.shape[0], num_experts), bool)
    for is_named in _columns(topk_idx, num_experts):
        routing_map |= is_named
    if topk_weights is None:
        return routing_map, None
    shape = topk_idx.shape
    check_floats("topk_to_dense", "topk_weights", topk_weights, "topk_idx", shape)
    weights, topk_idx = vary((jnp.asarray(topk_weights, jnp.float32), topk_idx))
    return routing_map, _spread(weights, topk_idx, num_experts)


def dense_to_topk(
    routing_map: Bool[Array, "T E"], probs: Float[Array, "T E"] | None, top_k: int
) -> tuple[Int32[Array, "T K"], Float32[Array, "T K"] | None]:
    """The true experts of every token in increasing order, padded with -1, with their probs.

    `topk_idx[t] = nonzero(routing_map[t], size=K, fill_value=-1)` and
    `topk_weights[t, k] = probs[t, topk_idx[t, k]]`, 0 at -1. Where a token has more than K true
    experts, the first K by index stay; `plan` counts the others when it is given the map itself.
    The inverse of `topk_to_dense` for ids that rise within each token.

    Args:
      routing_map: [T, E] bool.
      probs: [T, E] floating, or None. Used in float32; never read where the map is False.
      top_k: K.

    Returns:
      topk_idx [T, K] int32, and topk_weights [T, K] float32 or None.

    Differentiable in probs any number of times in reverse mode: each chosen expert gets the
    gradient of its place, every other exactly 0.

    Raises:
      TypeError, ValueError: for a wrong shape, dtype or top_k.

    Example:
      >>> import jax.numpy as jnp, jax_moe_ep as ep
      >>> routing_map = jnp.array([[False, True, False, True], [False, False, True, False]])
      >>> ep.dense_to_topk(routing_map, None, 2)[0].tolist()
      [[1, 3], [2, -1]]
    """
    check_map("dense_to_topk", routing_map)
    check_top_k("dense_to_topk", top_k)
    topk_idx = _true_experts(jnp.asarray(routing_map), top_k)
    if probs is None:
        return topk_idx, None
    shape = jnp.shape(routing_map)
    check_floats("dense_to_topk", "probs", probs, "routing_map", shape)
    probs, ids = vary((jnp.asarray(probs, jnp.float32), topk_idx))
    return topk_idx, _pick(probs, ids, shape[1])


# A dense map as the routing of a plan.


def assignments_of_map(
    routing_map: Bool[Array, "T E"], priority: Float[Array, "T E"] | None, top_k: int
) -> tuple[Int32[Array, "T K"], Float32[Array, "T K"] | None, Int32[Array, "E"] | None]:
    """Ids and their priority, and how many of my tokens name each expert beyond their first K."""
    topk_idx, priority = dense_to_topk(routing_map, priority, top_k)
    num_experts = routing_map.shape[1]
    if top_k >= num_experts:
        return topk_idx, priority, None
    last = topk_idx[:, -1:]
    is_cut = routing_map & (last >= 0) & (jnp.arange(num_experts) > last)
    return topk_idx, priority, is_cut.sum(0, dtype=jnp.int32)


def count_cut(plan: Plan, cut: Int32[Array, "E"]) -> Plan:
    """The plan with the assignments beyond K counted where their experts live, as dropped ones."""
    config, num_local = plan.config, plan.num_local_experts
    total = lax.psum(vary(cut, config.axes), config.axes)
    start = lax.axis_index(config.axis_name) * num_local
    mine = lax.dynamic_slice_in_dim(total, start, num_local).sum(dtype=jnp.int32)
    return dataclasses.replace(
        plan,
        num_assignments=plan.num_assignments + mine,
        num_dropped=plan.num_dropped + mine,
    )


# From places to experts and back: each of the two linear maps is the other's gradient.


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _spread(
    values: Float32[Array, "T K"], ids: Int[Array, "T K"], num_experts: int
) -> Float32[Array, "T E"]:
    """Sums the values of every expert over k in order, from +0."""
    dense = jnp.zeros((ids.shape[0], num_experts), jnp.float32)
    for k, is_named in enumerate(_columns(ids, num_experts)):
        dense += jnp.where(is_named, values[:, k, None], 0)
    return dense


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _pick(
    dense: Float32[Array, "T E"], ids: Int[Array, "T K"], num_experts: int
) -> Float32[Array, "T K"]:
    """The value of every place's expert, 0 without one."""
    is_expert = (ids >= 0) & (ids < num_experts)  # negative ids would count from the end
    ids = jnp.where(is_expert, ids, num_experts).astype(jnp.int32)
    return jnp.take_along_axis(dense, ids, axis=1, mode="fill", fill_value=0)


_spread.defvjp(
    lambda values, ids, num_experts: (_spread(values, ids, num_experts), ids),
    lambda num_experts, ids, dout: (_pick(dout, ids, num_experts), None),
)
_pick.defvjp(
    lambda dense, ids, num_experts: (_pick(dense, ids, num_experts), ids),
    lambda num_experts, ids, dout: (_spread(dout, ids, num_experts), None),
)


def _columns(ids: Int[Array, "T K"], num_experts: int) -> list[Bool[Array, "T E"]]:
    """For every k, whether it names the expert. No id is narrowed, and none outside is found."""
    experts = jnp.arange(num_experts, dtype=ids.dtype)
    return [ids[:, k, None] == experts for k in range(ids.shape[1])]


def _true_experts(routing_map: Bool[Array, "T E"], top_k: int) -> Int32[Array, "T K"]:
    """The first K true experts of every token, or -1.

    The index of true number k, from 0, is how many prefixes of the row hold at most k of them.
    Counted over the row's words of 32 bits, then over the bits of one word, so that nothing is
    larger than [T, K, 32] or [T, K, E/32].
    """
    num_tokens, num_experts = routing_map.shape
    num_words = -(-num_experts // _WORD_BITS)
    padding = num_words * _WORD_BITS - num_experts
    bits = jnp.pad(routing_map, ((0, 0), (0, padding))).reshape(num_tokens, num_words, _WORD_BITS)
    bit_idx = jnp.arange(_WORD_BITS, dtype=jnp.uint32)
    words = (bits.astype(jnp.uint32) << bit_idx).sum(-1, dtype=jnp.uint32)
    counts = lax.population_count(words).astype(jnp.int32)
    ends = jnp.cumsum(counts, axis=1, dtype=jnp.int32)

    k = jnp.arange(top_k, dtype=jnp.int32)
    word_idx = _count(ends[:, None] <= k[:, None])
    left = k - _take(ends - counts, word_idx)
    prefixes = jnp.uint32(0xFFFFFFFF) >> (_WORD_BITS - 1 - bit_idx)
    in_prefix = lax.population_count(_take(words, word_idx)[..., None] & prefixes)
    bit = _count(in_prefix.astype(jnp.int32) <= left[..., None])
    return jnp.where(word_idx < num_words, _WORD_BITS * word_idx + bit, -1)


def _count(is_true: Bool[Array, "T K N"]) -> Int32[Array, "T K"]:
    return is_true.sum(-1, dtype=jnp.int32)


def _take(values: Shaped[Array, "T W"], index: Int32[Array, "T K"]) -> Shaped[Array, "T K"]:
    return jnp.take_along_axis(values, index, axis=1, mode="fill", fill_value=0)
