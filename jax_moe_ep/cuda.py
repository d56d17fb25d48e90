"""The CUDA kernels as JAX functions: one XLA custom call an op, with the reference's signatures."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxtyping import Array, Float32, Int32, Shaped

from jax_moe_ep import reference
from jax_moe_ep.config import MAX_CUDA_EXPERTS, MAX_INT32, EpConfig
from jax_moe_ep.plan import Plan

_why_not = ""
try:
    import jax_moe_ep._ffi as _ffi
except ImportError as error:
    # Without nvcc there is none. A broken one must not keep the reference from running: the
    # reason is told where a kernel is wanted.
    _ffi = None
    _why_not = str(error)

if _ffi is not None:
    for name, stages in _ffi.registrations().items():
        jax.ffi.register_ffi_target(name, stages, platform="CUDA")

_refuse_p = Primitive("jax_moe_ep_refuse")
_refuse_p.def_abstract_eval(lambda x, *, message: x)


def _refuse_when_lowered(ctx: Any, x: Any, *, message: str) -> Any:
    raise NotImplementedError(message)


mlir.register_lowering(_refuse_p, _refuse_when_lowered)


def refused(op: Callable[..., Any], message: str) -> Callable[..., Any]:
    """The op with the same types, that raises NotImplementedError(message) when it is lowered."""

    def refuse(leaf: Any) -> Any:
        return _refuse_p.bind(lax.stop_gradient(leaf), message=message)

    return lambda *args, **static: op(*jax.tree.map(refuse, args), **static)


def _no_extension(name: str) -> str:
    return (
        f"jax_moe_ep.{name}: this installation has no CUDA extension ({_why_not}), so CUDA devices "
        "cannot run implementation='auto' or 'cuda'. Install with nvcc available (python -m "
        "jax_moe_ep doctor says what is missing), or use implementation='reference'"
    )


def _no_kernel(name: str) -> str:
    return (
        f"jax_moe_ep.{name}: this version has no CUDA kernel for it. Use "
        "implementation='reference', which runs on GPUs too"
    )


def _without_kernel(name: str) -> Callable[..., Any]:
    message = _no_extension(name) if _ffi is None else _no_kernel(name)
    return refused(getattr(reference, name), message)


def _plan_kernel(
    ids: Int32[Array, "T K"], priority: Float32[Array, "T K"] | None, *, config: EpConfig
) -> Plan:
    if config.num_experts > MAX_CUDA_EXPERTS:
        message = (
            f"jax_moe_ep.plan: the CUDA kernels support num_experts up to {MAX_CUDA_EXPERTS}, got "
            f"{config.num_experts}; use implementation='reference'"
        )
        return refused(reference.plan, message)(ids, priority, config=config)
    if priority is None:
        all_priority = jnp.zeros((0, ids.shape[1]), jnp.float32)
    else:
        all_priority = _gather(priority, config)
    rank = lax.axis_index(config.axis_name)
    return plan_from_gathered(_gather(ids, config), all_priority, rank, config=config)


def _gather(x: Shaped[Array, "T K"], config: EpConfig) -> Shaped[Array, "RT K"]:
    return lax.all_gather(x, config.axis_name).reshape(-1, x.shape[1])


def plan_from_gathered(
    ids: Int32[Array, "RT K"],
    priority: Float32[Array, "_ K"],
    rank: Int32[Array, ""],
    *,
    config: EpConfig,
    num_ranks: int | None = None,
) -> Plan:
    """The plan of one rank from the ids of all; `priority` is [R*T, K], or [0, K] by position.

    Needs no mesh when num_ranks is given: one GPU can then compute any rank's plan.
    """
    if _ffi is None:
        raise NotImplementedError(_no_extension("plan"))
    if num_ranks is None:
        num_ranks = lax.axis_size(config.axis_name)
    num_tokens, top_k = ids.shape[0] // num_ranks, ids.shape[1]
    num_local = config.num_experts // num_ranks
    capacity = config.num_rows(num_ranks, num_tokens, top_k)
    expert_limit = config.rows_per_expert(ids.size)
    by_priority = config.drop_policy == "priority"
    scratch_size = _ffi.plan_scratch_size(
        num_ranks=num_ranks,
        num_experts=config.num_experts,
        assignments_per_rank=num_tokens * top_k,
        by_priority=by_priority,
    )
    shapes = (
        ids.shape,  # slots
        (num_tokens, top_k),  # owners
        *[(num_local,)] * 3,  # group_counts, group_sizes, group_starts
        (num_ranks, num_local),  # source_counts
        *[()] * 3,  # num_assignments, num_dropped, required_rows
        (scratch_size,),
    )
    results = jax.ffi.ffi_call(
        "jax_moe_ep_plan", [_like(ids, shape, jnp.int32) for shape in shapes]
    )(
        ids,
        priority,
        rank,
        num_ranks=np.int64(num_ranks),
        num_experts=np.int64(config.num_experts),
        alignment=np.int64(config.alignment),
        capacity=np.int64(capacity),
        expert_limit=np.int64(MAX_INT32 if expert_limit is None else expert_limit),
        by_priority=by_priority,
        block_for_empty=config.empty_groups == "block",
        num_sms=np.int64(config.num_sms or MAX_INT32),
    )
    return Plan(
        *results[:-1],  # the last is scratch
        config=config,
        num_ranks=num_ranks,
        num_tokens=num_tokens,
        capacity=capacity,
    )


def _like(array: Array, shape: tuple[int, ...], dtype: Any) -> Any:
    """A result type that varies on the mesh axes of the array."""
    return jax.typeof(array).update(shape=shape, dtype=jnp.dtype(dtype))


plan = _without_kernel("plan") if _ffi is None else _plan_kernel
dispatch = _without_kernel("dispatch")
combine = _without_kernel("combine")
combine_backward = _without_kernel("combine_backward")
row_weights = _without_kernel("row_weights")
row_weights_backward = _without_kernel("row_weights_backward")
