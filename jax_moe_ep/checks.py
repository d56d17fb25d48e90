"""The checks of the public ops: each error names the argument, what was given and what to do."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jax_moe_ep.config import MAX_INT32, EpConfig
from jax_moe_ep.plan import Plan


def num_ranks(op: str, config: Any) -> int:
    if not isinstance(config, EpConfig):
        raise TypeError(f"jax_moe_ep.{op}: config must be an EpConfig, got {config!r}")
    try:
        return lax.axis_size(config.axis_name)
    except NameError as error:
        raise ValueError(
            f"jax_moe_ep.{op}: axis {config.axis_name!r} is not bound here ({error}). Call it "
            "inside jax.shard_map over a mesh that has this axis"
        ) from error


def check_ids(topk_idx: Any, config: EpConfig, num_ranks: int) -> None:
    shape, dtype = jnp.shape(topk_idx), jnp.result_type(topk_idx)
    if dtype not in (jnp.int32, jnp.int64):
        raise TypeError(f"jax_moe_ep.plan: topk_idx must be int32 or int64, got {dtype}")
    if len(shape) != 2 or shape[1] < 1:
        raise ValueError(
            f"jax_moe_ep.plan: topk_idx must be [T, K] with K >= 1, got shape {shape}. Reshape a "
            "batch [B, S, K] to [B*S, K]"
        )
    if config.num_experts % num_ranks:
        raise ValueError(
            f"jax_moe_ep.plan: num_experts={config.num_experts} is not a multiple of the "
            f"{num_ranks} ranks of axis {config.axis_name!r}; every rank holds as many experts"
        )
    num_assignments = num_ranks * shape[0] * shape[1]
    num_local = config.num_experts // num_ranks
    capacity = config.num_rows(num_ranks, *shape)
    if max(num_assignments + (config.alignment - 1) * num_local, capacity) > MAX_INT32:
        raise ValueError(
            f"jax_moe_ep.plan: R*T*K = {num_ranks}*{shape[0]}*{shape[1]} assignments with "
            f"alignment {config.alignment} need row numbers beyond {MAX_INT32}. Split the batch"
        )
    if config.empty_groups == "block" and capacity < num_local * config.alignment:
        raise ValueError(
            f"jax_moe_ep.plan: capacity={config.capacity} gives {capacity} rows, but "
            f"empty_groups='block' needs a block of {config.alignment} for each of the "
            f"{num_local} local experts"
        )


def check_priority(priority: Any, topk_idx: Array, config: EpConfig) -> None:
    if config.drop_policy == "position":
        if priority is not None:
            raise ValueError(
                "jax_moe_ep.plan: priority is given, but drop_policy='position' does not use it. "
                "Set drop_policy='priority' or leave it out"
            )
        return
    if priority is None:
        raise ValueError("jax_moe_ep.plan: drop_policy='priority' needs priority, [T, K] floating")
    if not jnp.issubdtype(jnp.result_type(priority), jnp.floating):
        raise TypeError(
            f"jax_moe_ep.plan: priority must be floating, got {jnp.result_type(priority)}"
        )
    if jnp.shape(priority) != topk_idx.shape:
        raise ValueError(
            f"jax_moe_ep.plan: priority must have the shape of topk_idx, {topk_idx.shape}, got "
            f"{jnp.shape(priority)}"
        )


def check_plan(op: str, plan: Any) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(f"jax_moe_ep.{op}: plan must be a Plan, got {type(plan).__name__}")
    size = num_ranks(op, plan.config)
    if size != plan.num_ranks:
        raise ValueError(
            f"jax_moe_ep.{op}: the plan was made for {plan.num_ranks} ranks, but axis "
            f"{plan.config.axis_name!r} has {size} here"
        )


def check_first_size(op: str, name: str, x: Any, size: int, letter: str) -> None:
    shape = jnp.shape(x)
    if not shape or shape[0] != size:
        raise ValueError(
            f"jax_moe_ep.{op}: {name} must be [{letter}, ...] with {letter} = {size} as in the "
            f"plan, got shape {shape}"
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
