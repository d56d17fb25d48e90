"""The definition of every op in plain JAX. Runs anywhere; short rather than fast.

Each function runs inside shard_map on one rank's shard, or anywhere for a group without axes. `ids`
are clean here: int32, -1 for "no expert". The letters are those of `Plan`; G = R*T tokens and G*K
assignments in the group, in the order (source rank, token, k).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32, PyTree, Shaped

from jax_moe_ep.bits import bits_dtype
from jax_moe_ep.config import EpConfig
from jax_moe_ep.plan import Plan


def plan(
    ids: Int32[Array, "T K"], priority: Float32[Array, "T K"] | None, config: EpConfig
) -> Plan:
    num_tokens, top_k = ids.shape
    num_ranks, num_experts = lax.axis_size(config.axis_name), config.num_experts
    num_local = num_experts // num_ranks
    me = lax.axis_index(config.axis_name)
    capacity = config.num_rows(num_ranks, num_tokens, top_k)

    # How many rows each expert may keep.
    expert = _gather(ids, config).reshape(-1)  # [G*K]
    is_expert = (expert >= 0) & (expert < num_experts)
    expert = jnp.where(is_expert, expert, num_experts)  # invalid: one past the last
    demand = jnp.bincount(expert, length=num_experts).astype(jnp.int32)
    limit = config.rows_per_expert(expert.size)
    wanted = demand if limit is None else jnp.minimum(demand, limit)
    cap = _capped(wanted.reshape(num_ranks, num_local), capacity, config).reshape(-1)  # [E]

    # Which assignments stay, and each one's place among those that stay.
    if priority is None:
        place = _place_in_group(expert, num_experts)
    else:
        place = _place_in_group(expert, num_experts, -_gather(priority, config).reshape(-1))
    is_kept = place < jnp.append(cap, 0)[expert]
    expert = jnp.where(is_kept, expert, num_experts)
    place = _place_in_group(expert, num_experts)

    source = jnp.repeat(jnp.arange(num_ranks), num_tokens * top_k)
    source_counts = jnp.zeros((num_ranks, num_experts + 1), jnp.int32).at[source, expert].add(1)
    source_counts = lax.dynamic_slice_in_dim(source_counts, me * num_local, num_local, axis=1)
    group_counts = source_counts.sum(0, dtype=jnp.int32)
    group_sizes = _aligned(group_counts, config)
    group_starts = jnp.cumsum(group_sizes, dtype=jnp.int32) - group_sizes

    local = expert - me * num_local
    is_mine = (local >= 0) & (local < num_local)
    slots = jnp.where(is_mine, group_starts[jnp.clip(local, 0, num_local - 1)] + place, -1)
    owners = jnp.where(expert < num_experts, expert // num_local, -1)
    my_demand = lax.dynamic_slice_in_dim(demand, me * num_local, num_local)
    return Plan(
        slots=slots.reshape(-1, top_k),
        owners=owners.reshape(num_ranks, num_tokens, top_k)[me],
        group_counts=group_counts,
        group_sizes=group_sizes,
        group_starts=group_starts,
        source_counts=source_counts,
        num_assignments=my_demand.sum(dtype=jnp.int32),
        num_dropped=(my_demand - group_counts).sum(dtype=jnp.int32),
        required_rows=_aligned(my_demand, config).sum(dtype=jnp.int32),
        config=config,
        num_ranks=num_ranks,
        num_tokens=num_tokens,
        capacity=capacity,
    )


def row_sources(plan: Plan) -> Int32[Array, "C"]:
    """(source rank * T + token) * K + k of every row, or -1."""
    slots = plan.slots.reshape(-1)
    slots = jnp.where(slots < 0, plan.capacity, slots)  # out of bounds: dropped below
    sources = jnp.arange(slots.size, dtype=jnp.int32)
    return jnp.full(plan.capacity, -1, jnp.int32).at[slots].set(sources, mode="drop")


def dispatch(x: PyTree[Shaped[Array, "T ..."]], plan: Plan) -> PyTree[Shaped[Array, "C ..."]]:
    source = row_sources(plan)
    is_tail = jnp.arange(plan.capacity) >= plan.group_sizes.sum()

    def move(x: Shaped[Array, "T ..."]) -> Shaped[Array, "C ..."]:
        bits = lax.bitcast_convert_type(x, bits_dtype(x.dtype))
        tokens = _gather(bits, plan.config).reshape(-1, *x.shape[1:])[source // plan.top_k]
        rows = jnp.where(_column(source >= 0, x), tokens, jnp.zeros((), bits.dtype))
        if plan.config.tail == "undefined":
            poison = lax.bitcast_convert_type(_poison(x.dtype), bits.dtype)
            rows = jnp.where(_column(is_tail, x), poison, rows)
        return lax.bitcast_convert_type(rows, x.dtype)

    return jax.tree.map(move, x)


def combine(
    y: Float[Array, "C ..."], plan: Plan, weights: Float[Array, "T K"] | None
) -> Float[Array, "T ..."]:
    # On the expert's rank: one partial for every token of the group.
    scaled = y.astype(jnp.float32)
    if weights is not None:
        scaled *= _column(row_weights(weights.astype(jnp.float32), plan), y)
    partial = _rounded(_sum_in_order(scaled, plan.slots.T), y.dtype)  # [G, ...]
    # On the token's rank: the sum over the ranks that own one of its rows.
    landed = _send_back(partial, plan).astype(jnp.float32)  # [R, T, ...]
    ranks = jnp.arange(plan.num_ranks, dtype=jnp.int32)[:, None, None]
    position = jnp.arange(plan.num_ranks * plan.num_tokens).reshape(plan.num_ranks, -1)
    senders = jnp.where((plan.owners == ranks).any(-1), position, -1)  # [R, T]
    out = _rounded(_sum_in_order(landed.reshape(-1, *y.shape[1:]), senders), y.dtype)
    return jnp.where(out == 0, 0, out)  # +0, which the compiler's own idea of +0 + -0 may not be


def combine_backward(
    dout: Float[Array, "T ..."],
    y: Float[Array, "C ..."],
    plan: Plan,
    weights: Float[Array, "T K"] | None,
) -> tuple[Float[Array, "C ..."], Float[Array, "T K"] | None]:
    dout_rows = dispatch(dout, plan)
    if weights is None:
        return dout_rows, None
    dout_rows = dout_rows.astype(jnp.float32)
    weight = row_weights(weights.astype(jnp.float32), plan)
    dots = (dout_rows * y.astype(jnp.float32)).sum(range(1, y.ndim))
    dw = row_weights_backward(dots, plan).astype(weights.dtype)
    return _rounded(_column(weight, y) * dout_rows, y.dtype), dw


def row_weights(weights: Float[Array, "T K"], plan: Plan) -> Float[Array, "C"]:
    source = row_sources(plan)
    return jnp.where(source >= 0, _gather(weights, plan.config).reshape(-1)[source], 0)


def row_weights_backward(drow: Float[Array, "C"], plan: Plan) -> Float[Array, "T K"]:
    landed = _send_back(jnp.where(plan.slots >= 0, drow[plan.slots], 0), plan)  # [R, T, K]
    ranks = jnp.arange(plan.num_ranks, dtype=jnp.int32)[:, None, None]
    return jnp.where(plan.owners == ranks, landed, 0).sum(0, dtype=drow.dtype)  # one owner each


def _gather(x: Shaped[Array, "T ..."], config: EpConfig) -> Shaped[Array, "R T ..."]:
    if not config.axes:
        return x[None]  # one rank outside of any mesh
    return lax.all_gather(x, config.axis_name)


def _send_back(x: Shaped[Array, "G ..."], plan: Plan) -> Shaped[Array, "R T ..."]:
    """Returns every rank's entries for my tokens, by rank."""
    x = x.reshape(plan.num_ranks, plan.num_tokens, *x.shape[1:])
    if not plan.config.axes:
        return x
    return lax.all_to_all(x, plan.config.axis_name, split_axis=0, concat_axis=0)


def _aligned(counts: Int32[Array, "..."], config: EpConfig) -> Int32[Array, "..."]:
    if config.empty_groups == "block":
        counts = jnp.maximum(counts, 1)
    return -(-counts // config.alignment) * config.alignment


def _capped(wanted: Int32[Array, "R L"], capacity: int, config: EpConfig) -> Int32[Array, "R L"]:
    """min(wanted, m) with, on each rank, the largest m whose aligned rows fit in C."""

    def try_bit(i: Int32[Array, ""], m: Int32[Array, "R 1"]) -> Int32[Array, "R 1"]:
        trial = m + (1 << (30 - i))
        rows = _aligned(jnp.minimum(wanted, trial), config).sum(1, keepdims=True)
        return jnp.where(rows <= capacity, trial, m)

    m = lax.fori_loop(0, 31, try_bit, jnp.zeros_like(wanted[:, :1]))
    return jnp.minimum(wanted, m)


def _place_in_group(
    group: Int32[Array, "N"], num_groups: int, *order: Shaped[Array, "N"]
) -> Int32[Array, "N"]:
    """How many members of its group come before each, by `order` and then by position."""
    by_group = jnp.lexsort((*order, group))
    counts = jnp.bincount(group, length=num_groups + 1)
    starts = jnp.cumsum(counts) - counts
    place = jnp.arange(group.size) - starts[group[by_group]]
    return jnp.zeros_like(group).at[by_group].set(place.astype(jnp.int32))


def _sum_in_order(
    rows: Float32[Array, "M ..."], index: Int32[Array, "N T"]
) -> Float32[Array, "T ..."]:
    """Sums rows[index[n]] over n, first to last, from +0; -1 adds nothing.

    A scan, because a loop keeps the compiler from contracting the product that made a row and
    this sum into one fused multiply-add, which rounds once where the definition rounds twice.
    """

    def add(total: Array, i: Array) -> tuple[Array, None]:
        return total + jnp.where(_column(i >= 0, rows), rows[i], 0), None

    zero = jnp.zeros_like(rows, shape=(index.shape[1], *rows.shape[1:]))
    return lax.scan(add, zero, index)[0]


def _rounded(x: Float32[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """x in the dtype, also where the compiler could keep the bits beyond it for the next op."""
    return lax.optimization_barrier(x.astype(dtype))


def _column(values: Shaped[Array, "N"], like: jax.Array) -> Shaped[Array, "N ..."]:
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _poison(dtype: jnp.dtype) -> Shaped[Array, ""]:
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.full((), jnp.nan, dtype)
    return jnp.full((), -1, jnp.int32).astype(dtype)
