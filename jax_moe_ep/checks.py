"""The checks of the public ops: each error names the argument, what was given and what to do."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jax_moe_ep.config import MAX_INT32, EpConfig, axis_tuple
from jax_moe_ep.plan import Plan


def check_choice(where: str, name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        allowed = ", ".join(map(repr, choices))
        raise ValueError(f"{where}: {name} must be one of {allowed}, got {value!r}")


def check_config(op: str, config: Any) -> None:
    if not isinstance(config, EpConfig):
        raise TypeError(f"jax_moe_ep.{op}: config must be an EpConfig, got {config!r}")


def check_group(op: str, config: Any) -> int:
    """The number of ranks of the group."""
    check_config(op, config)
    axes = check_axes(op, config.axis_name, otherwise=", or use axis_name=() for one rank")
    return lax.axis_size(axes)


def axis_names(
    op: str, value: Any, *, name: str = "axis_name", at_least: int = 0
) -> tuple[str, ...]:
    """Of one mesh axis or several, bound or not."""
    names = axis_tuple(value)
    if names is None or len(names) < at_least:
        raise TypeError(
            f"jax_moe_ep.{op}: {name} must be a mesh axis name or a tuple of different ones, "
            f"got {value!r}"
        )
    return names


def check_axes(
    op: str, axis_name: Any, *, at_least: int = 0, otherwise: str = ""
) -> tuple[str, ...]:
    """Mesh axes that are bound; `otherwise`: what else to do where they are not."""
    names = axis_names(op, axis_name, at_least=at_least)
    try:
        lax.axis_size(names)
    except NameError as error:
        raise ValueError(
            f"jax_moe_ep.{op}: axis {axis_name!r} is not bound here ({error}). Call it inside "
            f"jax.shard_map over a mesh that has this axis{otherwise}"
        ) from error
    return names


def check_integers(op: str, name: str, values: Any, remedy: str = "") -> None:
    if jnp.result_type(values) not in (jnp.int32, jnp.int64):
        raise TypeError(
            f"jax_moe_ep.{op}: {name} must be int32 or int64, got {jnp.result_type(values)}{remedy}"
        )


def check_ids(op: str, topk_idx: Any) -> None:
    shape = jnp.shape(topk_idx)
    check_integers(op, "topk_idx", topk_idx, ". dense_to_topk makes ids of a bool map")
    if len(shape) != 2 or shape[1] < 1:
        raise ValueError(
            f"jax_moe_ep.{op}: topk_idx must be [T, K] with K >= 1, got shape {shape}. Reshape a "
            "batch [B, S, K] to [B*S, K]"
        )


def check_map(op: str, routing_map: Any, num_experts: int | None = None) -> None:
    shape, dtype = jnp.shape(routing_map), jnp.result_type(routing_map)
    if dtype != jnp.bool_:
        raise TypeError(
            f"jax_moe_ep.{op}: routing_map must be bool, got {dtype}. topk_to_dense makes a "
            "map of ids"
        )
    if len(shape) != 2 or shape[1] < 1 or num_experts not in (None, shape[1]):
        experts = "E >= 1" if num_experts is None else f"E = {num_experts}"
        raise ValueError(
            f"jax_moe_ep.{op}: routing_map must be [T, E] with {experts}, got shape {shape}. "
            "Reshape a batch [B, S, E] to [B*S, E]"
        )


def check_int(op: str, name: str, value: Any, at_least: int) -> None:
    if type(value) is not int or value < at_least:
        raise ValueError(
            f"jax_moe_ep.{op}: {name} must be an int of at least {at_least}, got {value!r}"
        )


def check_num_experts(op: str, num_experts: Any) -> None:
    check_int(op, "num_experts", num_experts, at_least=1)


def check_top_k(op: str, top_k: Any) -> None:
    if type(top_k) is not int or top_k < 1:
        raise ValueError(
            f"jax_moe_ep.{op}: a routing map needs top_k, an int of at least 1, got {top_k!r}: how "
            "many experts a token may name, which sizes the arrays"
        )


def check_routing(topk_idx: Any, config: EpConfig, top_k: Any) -> None:
    """Ids, or a routing map together with top_k."""
    if jnp.result_type(topk_idx) == jnp.bool_:
        check_map("plan", topk_idx, config.num_experts)
        check_top_k("plan", top_k)
        return
    check_ids("plan", topk_idx)
    if top_k is not None:
        raise ValueError(
            f"jax_moe_ep.plan: top_k={top_k!r} is given, but topk_idx "
            f"{jnp.result_type(topk_idx)}{list(jnp.shape(topk_idx))} has its own K. Leave top_k "
            "out; it belongs to a bool routing map"
        )


def check_floats(op: str, name: str, values: Any, like: str, shape: tuple[int, ...]) -> None:
    if not jnp.issubdtype(jnp.result_type(values), jnp.floating):
        raise TypeError(f"jax_moe_ep.{op}: {name} must be floating, got {jnp.result_type(values)}")
    if jnp.shape(values) != shape:
        raise ValueError(
            f"jax_moe_ep.{op}: {name} must have the shape of {like}, {shape}, got "
            f"{jnp.shape(values)}"
        )


def check_experts_of_ranks(op: str, config: EpConfig, num_ranks: int) -> None:
    if config.num_experts % num_ranks:
        raise ValueError(
            f"jax_moe_ep.{op}: num_experts={config.num_experts} is not a multiple of the "
            f"{num_ranks} ranks of axis {config.axis_name!r}; every rank holds as many experts"
        )


def check_sizes(shape: tuple[int, ...], config: EpConfig, num_ranks: int) -> None:
    check_experts_of_ranks("plan", config, num_ranks)
    num_assignments = num_ranks * shape[0] * shape[1]
    num_local = config.num_experts // num_ranks
    capacity = config.num_rows(num_ranks, *shape)
    if max(num_assignments + (config.alignment - 1) * num_local, capacity) > MAX_INT32:
        raise ValueError(
            f"jax_moe_ep.plan: R*T*K = {num_ranks}*{shape[0]}*{shape[1]} assignments with "
            f"alignment {config.alignment} need row numbers beyond {MAX_INT32}. Split "
            "the batch, or lower the alignment"
        )
    if config.empty_groups == "block" and capacity < num_local * config.alignment:
        raise ValueError(
            f"jax_moe_ep.plan: capacity={config.capacity} gives {capacity} rows, but "
            f"empty_groups='block' needs a block of {config.alignment} for each of the "
            f"{num_local} local experts"
        )


def check_priority(priority: Any, routing: Array, config: EpConfig) -> None:
    """`routing` is topk_idx [T, K], or a routing map [T, E] whose priority is as large."""
    if config.drop_policy == "position":
        if priority is not None:
            raise ValueError(
                "jax_moe_ep.plan: priority is given, but drop_policy='position' does not use it. "
                "Set drop_policy='priority' or leave it out"
            )
        return
    if priority is None:
        raise ValueError(
            "jax_moe_ep.plan: drop_policy='priority' needs priority, [T, K] floating, or [T, E] "
            "with a routing map"
        )
    is_map = jnp.result_type(routing) == jnp.bool_
    like = "routing_map" if is_map else "topk_idx"
    check_floats("plan", "priority", priority, like, jnp.shape(routing))


def check_plan(op: str, plan: Any) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(f"jax_moe_ep.{op}: plan must be a Plan, got {type(plan).__name__}")
    size = check_group(op, plan.config)
    if size != plan.num_ranks:
        raise ValueError(
            f"jax_moe_ep.{op}: the plan was made for {plan.num_ranks} ranks, but axis "
            f"{plan.config.axis_name!r} has {size} here"
        )
    tokens, experts = plan.num_tokens, plan.num_local_experts
    expected = {
        "slots": (size * tokens, plan.top_k),
        "owners": (tokens, plan.top_k),
        "group_counts": (experts,),
        "group_sizes": (experts,),
        "group_starts": (experts,),
        "source_counts": (size, experts),
    }
    for name, shape in expected.items():
        if jnp.shape(getattr(plan, name)) != shape:
            raise ValueError(
                f"jax_moe_ep.{op}: {name} of the plan must have shape {shape}, got "
                f"{jnp.shape(getattr(plan, name))}. Take one plan out of those that were stacked, "
                "with jax.tree.map(lambda a: a[i], plan), or inside jax.lax.scan"
            )


def check_first_size(op: str, name: str, x: Any, size: int, letter: str) -> None:
    shape = jnp.shape(x)
    if not shape or shape[0] != size:
        raise ValueError(
            f"jax_moe_ep.{op}: {name} must be [{letter}, ...] with {letter} = {size} as in the "
            f"plan, got shape {shape}"
        )


def check_no_group(op: str, plan: Any) -> None:
    if isinstance(plan, Plan) and plan.config.axes:
        raise ValueError(
            f"jax_moe_ep.{op}: the plan must be that of permute, whose group is one rank without a "
            f"mesh axis, got the plan of axis {plan.config.axis_name!r}. Use combine"
        )


def check_summed(op: str, name: str, y: Array, what: str = "") -> None:
    """`what` of the values is a sum of combine's."""
    if not jnp.issubdtype(y.dtype, jnp.floating) or y.dtype.itemsize > 4:
        raise TypeError(
            f"jax_moe_ep.{op}: {what}{name} must be floating with at most 32 bits, got {y.dtype}: "
            f"sums are in float32. Convert {name} before the call"
        )


def check_leaves(op: str, x: Any, size: int, letter: str, like: str) -> None:
    for leaf in jax.tree.leaves(x):
        shape = jnp.shape(leaf)
        if not shape or shape[0] != size:
            raise ValueError(
                f"jax_moe_ep.{op}: every leaf of x must be [{letter}, ...] with {letter} = {size} "
                f"as in {like}, got shape {shape}"
            )


def check_chunks(chunk_sizes: Any, order: Any) -> None:
    shape = jnp.shape(chunk_sizes)
    for name, values in (("chunk_sizes", chunk_sizes), ("order", order)):
        check_integers("sort_chunks", name, values)
        if len(shape) != 1 or shape[0] < 1 or jnp.shape(values) != shape:
            raise ValueError(
                "jax_moe_ep.sort_chunks: chunk_sizes and order must be [M] with M >= 1, got shapes "
                f"{shape} and {jnp.shape(order)}. Flatten sizes [R, L] with reshape(-1)"
            )


def check_weights(op: str, topk_weights: Any, plan: Plan) -> None:
    if not jnp.issubdtype(jnp.result_type(topk_weights), jnp.floating):
        raise TypeError(
            f"jax_moe_ep.{op}: topk_weights must be floating, got {jnp.result_type(topk_weights)}"
        )
    if jnp.shape(topk_weights) != plan.owners.shape:
        raise ValueError(
            f"jax_moe_ep.{op}: topk_weights must be [T, K] = {plan.owners.shape} as in the plan, "
            f"got {jnp.shape(topk_weights)}"
        )
