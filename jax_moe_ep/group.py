"""The custom calls of a group of more than one rank: who is in it, what all ranks agree on."""

import hashlib
import os
from typing import Any

import jax
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32, Shaped

from jax_moe_ep.config import MAX_INT32, EpConfig
from jax_moe_ep.custom_call import custom_call
from jax_moe_ep.plan import Plan

# Set to 1 to stage tokens in the arena as between processes where a peer could read them in place.
# Read when an op is traced.
FORCE_STAGED = "JAX_MOE_EP_FORCE_STAGED"


def device_groups(config: EpConfig) -> np.ndarray:
    """[number of groups, R]: the devices of every EP group, each in the order of its ranks.

    A device is its place in the mesh, flattened: inside shard_map the mesh is abstract. Devices
    that differ only on the axes of the group are in one group, as for `lax.all_gather`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    places = np.arange(mesh.size, dtype=np.int64).reshape(mesh.axis_sizes)
    others = [name for name in mesh.axis_names if name not in config.axes]
    order = [mesh.axis_names.index(name) for name in (*others, *config.axes)]
    num_ranks = int(np.prod([mesh.shape[name] for name in config.axes]))
    return places.transpose(order).reshape(-1, num_ranks)


def group_call(
    op: str,
    result_types: Any,
    plan: Plan,
    *args: Array,
    op_code: int,
    row_bytes: int,
    has_weights: bool,
    force_vector: bool,
) -> Any:
    """The custom call of an op in a group: the plan's arrays first, its options behind.

    Args:
      op: dispatch, combine or combine_backward.
      result_types: of the call.
      plan: the Plan of the batch.
      args: what follows the plan's arrays.
      op_code: the op's number in the extension.
      row_bytes: of the longest rows that move.
      has_weights: whether weights go to the peers.
      force_vector: no bulk copies.
    """
    plan_arrays = (plan.slots, plan.group_counts, plan.group_sizes, plan.group_starts)
    return _call(
        op,
        result_types,
        plan.config,
        *plan_arrays,
        *args,
        op_code=op_code,
        sizes=(plan.num_tokens, plan.top_k, row_bytes, plan.capacity),
        has_weights=has_weights,
        force_vector=force_vector,
    )


def group_plan(
    config: EpConfig,
    ids: Int32[Array, "T K"],
    priority: Float32[Array, "_ K"],
    result_types: Any,
    *,
    op_code: int,
    capacity: int,
    **options: Any,
) -> Any:
    """The custom call of plan in a group.

    Args:
      config: of the group.
      ids: of this rank.
      priority: likewise, [T, K], or [0, K] by position.
      result_types: all ids, all priorities, and the plan's.
      op_code: the op's number in the extension.
      capacity: C.
      options: what plan needs beside, as attributes.
    """
    num_tokens, top_k = ids.shape
    row_bytes = top_k * ids.dtype.itemsize
    if len(priority):
        row_bytes += top_k * priority.dtype.itemsize
    return _call(
        "plan",
        result_types,
        config,
        ids,
        priority,
        op_code=op_code,
        sizes=(num_tokens, top_k, row_bytes, capacity),
        has_weights=False,
        force_vector=False,
        **options,
    )


def group_gather(
    config: EpConfig, x: Shaped[Array, "T K"], *, op_code: int
) -> Shaped[Array, "RT K"]:
    """`lax.all_gather(x, config.axis_name, tiled=True)` in a call of the group.

    Args:
      config: of the group.
      x: of this rank.
      op_code: the op's number in the extension.
    """
    num_tokens, top_k = x.shape
    num_rows = num_tokens * lax.axis_size(config.axis_name)
    return _call(
        "gather",
        jax.typeof(x).update(shape=(num_rows, top_k)),
        config,
        x,
        op_code=op_code,
        sizes=(num_tokens, top_k, top_k * x.dtype.itemsize, num_rows),
        has_weights=False,
        force_vector=False,
    )


def _call(
    op: str,
    result_types: Any,
    config: EpConfig,
    *args: Array,
    op_code: int,
    sizes: tuple[int, int, int, int],
    has_weights: bool,
    force_vector: bool,
    **options: Any,
) -> Any:
    """The custom call of a group. sizes: num_tokens, top_k, row_bytes, capacity; options: of the op
    alone."""
    num_tokens, top_k, row_bytes, capacity = sizes
    agreed = (op, [(arg.shape, str(arg.dtype)) for arg in args], capacity, config, options)
    digest = hashlib.blake2b(repr(agreed).encode(), digest_size=8).digest()
    return custom_call(f"jax_moe_ep_group_{op}", result_types)(
        *args,
        op=np.int64(op_code),
        groups=device_groups(config).reshape(-1),
        num_ranks=np.int64(lax.axis_size(config.axis_name)),
        num_tokens=np.int64(num_tokens),
        top_k=np.int64(top_k),
        row_bytes=np.int64(row_bytes),
        alignment=np.int64(config.alignment),
        capacity=np.int64(capacity),
        num_sms=np.int64(config.num_sms or MAX_INT32),
        timeout_ns=np.int64(config.timeout_s * 1e9),
        options_hash=np.int64(int.from_bytes(digest, "little", signed=True)),
        has_weights=has_weights,
        zero_tail=config.tail == "zero",
        force_vector=force_vector,
        force_staged=os.environ.get(FORCE_STAGED, "0") != "0",
        **options,
    )
