"""The custom calls of a group of more than one rank: who is in it, what all ranks agree on."""

import hashlib
import os
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from jax_moe_ep.config import MAX_INT32, EpConfig
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
    config = plan.config
    agreed = (op, [(arg.shape, str(arg.dtype)) for arg in args], plan.capacity, config)
    digest = hashlib.blake2b(repr(agreed).encode(), digest_size=8).digest()
    return jax.ffi.ffi_call(f"jax_moe_ep_group_{op}", result_types)(
        plan.slots,
        plan.group_counts,
        plan.group_sizes,
        plan.group_starts,
        *args,
        op=np.int64(op_code),
        groups=device_groups(config).reshape(-1),
        num_ranks=np.int64(plan.num_ranks),
        num_tokens=np.int64(plan.num_tokens),
        top_k=np.int64(plan.top_k),
        row_bytes=np.int64(row_bytes),
        alignment=np.int64(config.alignment),
        capacity=np.int64(plan.capacity),
        num_sms=np.int64(config.num_sms or MAX_INT32),
        timeout_ns=np.int64(config.timeout_s * 1e9),
        options_hash=np.int64(int.from_bytes(digest, "little", signed=True)),
        has_weights=has_weights,
        zero_tail=config.tail == "zero",
        force_vector=force_vector,
        force_staged=os.environ.get(FORCE_STAGED, "0") != "0",
    )
