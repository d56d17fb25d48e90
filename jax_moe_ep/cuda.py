"""The CUDA kernels as JAX functions: one XLA custom call an op, with the reference's signatures."""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int32, Shaped

from jax_moe_ep import reference
from jax_moe_ep.config import MAX_CUDA_EXPERTS, MAX_INT32, EpConfig
from jax_moe_ep.custom_call import custom_call
from jax_moe_ep.group import group_call, group_gather, group_plan
from jax_moe_ep.plan import Plan
from jax_moe_ep.refusal import refused

# Set to 1 to use 16-byte loads and stores where the device could copy in bulk, for tests. Read when
# an op is traced.
FORCE_VECTOR = "JAX_MOE_EP_FORCE_VECTOR"

# Set to 1 to plan few assignments by the kernels of many, likewise.
FORCE_LARGE = "JAX_MOE_EP_FORCE_LARGE"

ROW_BYTES_MULTIPLE = 16

_why_not = ""
try:
    import jax_moe_ep._ffi as _ffi
except ImportError as error:
    # Without nvcc there is none. A broken one must not keep the reference from running: the
    # reason is told where a kernel is wanted.
    _ffi = None
    _why_not = str(error)

if _ffi is not None:
    for name, state_type in _ffi.state_types().items():
        jax.ffi.register_ffi_type(name, state_type, platform="CUDA")
    for name, stages in _ffi.registrations().items():
        jax.ffi.register_ffi_target(name, stages, platform="CUDA")


def _no_extension(name: str) -> str:
    return (
        f"jax_moe_ep.{name}: this installation has no CUDA extension ({_why_not}), so CUDA devices "
        "cannot run implementation='auto' or 'cuda'. Install with nvcc available (python -m "
        "jax_moe_ep doctor says what is missing), or use implementation='reference'"
    )


def has_extension() -> bool:
    """Whether the CUDA kernels are built and can be loaded here."""
    return _ffi is not None


def extension(name: str) -> Any:
    """The extension; an error that tells what `name` misses where there is none."""
    if _ffi is None:
        raise NotImplementedError(_no_extension(name))
    return _ffi


def failures() -> list[str]:
    """What failed in the groups of this process since the last reset; the causes first."""
    return _ffi.failures() if _ffi is not None else []


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
        priority = jnp.zeros((0, ids.shape[1]), jnp.float32)
    num_ranks = lax.axis_size(config.axis_name)
    if num_ranks == 1:
        return plan_from_gathered(ids, priority, config=config, num_ranks=1, rank=0)
    call = _PlanCall(config, num_ranks, *ids.shape)
    everyone = [_like(ids, (num_ranks * len(x), ids.shape[1]), x.dtype) for x in (ids, priority)]
    results = group_plan(
        config,
        ids,
        priority,
        [*everyone, *call.result_types(ids)],
        op_code=extension("plan").op_codes()["plan"],
        capacity=call.capacity,
        **call.options(),
    )
    return call.plan(results[2:])


def _gather(config: EpConfig, x: Shaped[Array, "T K"]) -> Shaped[Array, "RT K"]:
    """x of all ranks, in rank order."""
    if lax.axis_size(config.axis_name) == 1:
        return x
    return group_gather(config, x, op_code=extension("gather").op_codes()["gather"])


def plan_from_gathered(
    ids: Int32[Array, "RT K"],
    priority: Float32[Array, "_ K"],
    *,
    config: EpConfig,
    num_ranks: int,
    rank: int,
) -> Plan:
    """The plan of one rank from the ids of all; `priority` is [R*T, K], or [0, K] by position.

    Needs no mesh: one GPU can compute any rank's plan.
    """
    call = _PlanCall(config, num_ranks, ids.shape[0] // num_ranks, ids.shape[1])
    results = custom_call("jax_moe_ep_plan", call.result_types(ids))(
        ids,
        priority,
        num_ranks=np.int64(num_ranks),
        rank=np.int64(rank),
        alignment=np.int64(config.alignment),
        capacity=np.int64(call.capacity),
        num_sms=np.int64(config.num_sms or MAX_INT32),
        **call.options(),
    )
    return call.plan(results)


@dataclasses.dataclass(frozen=True)
class _PlanCall:
    """What the custom calls of plan share."""

    config: EpConfig
    num_ranks: int
    num_tokens: int
    top_k: int

    @property
    def capacity(self) -> int:
        return self.config.num_rows(self.num_ranks, self.num_tokens, self.top_k)

    @property
    def by_priority(self) -> bool:
        return self.config.drop_policy == "priority"

    def result_types(self, ids: Int32[Array, "_ K"]) -> list[Any]:
        num_local = self.config.num_experts // self.num_ranks
        scratch_size = extension("plan").plan_scratch_size(
            num_ranks=self.num_ranks,
            num_experts=self.config.num_experts,
            assignments_per_rank=self.num_tokens * self.top_k,
            by_priority=self.by_priority,
        )
        shapes = (
            (self.num_ranks * self.num_tokens, self.top_k),  # slots
            (self.num_tokens, self.top_k),  # owners
            *[(num_local,)] * 3,  # group_counts, group_sizes, group_starts
            (self.num_ranks, num_local),  # source_counts
            *[()] * 3,  # num_assignments, num_dropped, required_rows
            (scratch_size,),
        )
        return [_like(ids, shape, jnp.int32) for shape in shapes]

    def options(self) -> dict[str, Any]:
        num_assignments = self.num_ranks * self.num_tokens * self.top_k
        expert_limit = self.config.rows_per_expert(num_assignments)
        return {
            "num_experts": np.int64(self.config.num_experts),
            "expert_limit": np.int64(MAX_INT32 if expert_limit is None else expert_limit),
            "by_priority": self.by_priority,
            "block_for_empty": self.config.empty_groups == "block",
            "force_large": _is_set(FORCE_LARGE),
        }

    def plan(self, results: Sequence[Array]) -> Plan:
        return Plan(
            *results[:-1],  # the last is scratch
            config=self.config,
            num_ranks=self.num_ranks,
            num_tokens=self.num_tokens,
            capacity=self.capacity,
        )


def _dispatch_kernel(x: tuple[Array, ...], plan: Plan) -> tuple[Array, ...]:
    if problem := _why_no_rows("dispatch", x):
        return refused(reference.dispatch, problem)(x, plan)
    shapes = [_like(leaf, (plan.capacity, *leaf.shape[1:]), leaf.dtype) for leaf in x]
    return tuple(_call("dispatch", shapes, plan, *x))


def _combine_kernel(
    y: Float[Array, "C ..."], plan: Plan, weights: Float[Array, "T K"] | None
) -> Float[Array, "T ..."]:
    if problem := _why_no_sums("combine", y):
        return refused(reference.combine, problem)(y, plan, weights)
    if weights is None:
        weights = jnp.zeros((0, plan.top_k), jnp.float32)
    shape = _like(y, (plan.num_tokens, *y.shape[1:]), y.dtype)
    return _call("combine", shape, plan, y, weights.astype(jnp.float32))


def _combine_backward_kernel(
    dout: Float[Array, "T ..."],
    y: Float[Array, "C ..."],
    plan: Plan,
    weights: Float[Array, "T K"],
) -> tuple[Float[Array, "C ..."], Float[Array, "T K"]]:
    if problem := _why_no_sums("combine", y):
        return refused(reference.combine_backward, problem)(dout, y, plan, weights)
    shapes = [_like(y, y.shape, y.dtype), _like(y, weights.shape, jnp.float32)]
    dy, dw = _call("combine_backward", shapes, plan, dout, y, weights.astype(jnp.float32))
    return dy, dw.astype(weights.dtype)


def _row_weights_kernel(weights: Float[Array, "T K"], plan: Plan) -> Float[Array, "C"]:
    if problem := _why_no_weights(weights):
        return refused(reference.row_weights, problem)(weights, plan)
    shape = _like(weights, (plan.capacity,), weights.dtype)
    # A number a row: one rank's kernel places those of all tokens.
    return _call_alone("row_weights", shape, plan, _gather(plan.config, weights))


def _row_weights_backward_kernel(drow: Float[Array, "C"], plan: Plan) -> Float[Array, "T K"]:
    if problem := _why_no_weights(drow):
        return refused(reference.row_weights_backward, problem)(drow, plan)
    shape = _like(drow, plan.slots.shape, drow.dtype)
    dweights = _call_alone("row_weights_backward", shape, plan, drow)  # of all ranks' tokens
    if plan.num_ranks == 1:
        return dweights
    dweights = dweights.reshape(plan.num_ranks, *plan.owners.shape)
    landed = lax.all_to_all(dweights, plan.config.axis_name, split_axis=0, concat_axis=0)
    own = jnp.take_along_axis(landed, jnp.maximum(plan.owners, 0)[None], axis=0)[0]
    return jnp.where(plan.owners >= 0, own, 0)


def _call(op: str, result_types: Any, plan: Plan, *args: Array) -> Any:
    """The custom call of an op that moves rows: of a group, or of one rank without the rest."""
    if plan.num_ranks == 1:
        return _call_alone(op, result_types, plan, *args)
    weights = args[-1] if op != "dispatch" else None
    rows = args if op == "dispatch" else args[:-1]
    owners = () if op == "dispatch" else (plan.owners,)
    return group_call(
        op,
        result_types,
        plan,
        *owners,
        *args,
        op_code=extension(op).op_codes()[op],
        row_bytes=max(_row_bytes(leaf) for leaf in rows),
        has_weights=weights is not None and weights.shape[0] > 0,
        force_vector=_is_set(FORCE_VECTOR),
    )


def _call_alone(op: str, result_types: Any, plan: Plan, *args: Array) -> Any:
    """The custom call of an op on one rank: the plan's arrays first, its options behind."""
    return custom_call(f"jax_moe_ep_{op}", result_types)(
        plan.slots,
        plan.group_counts,
        plan.group_sizes,
        plan.group_starts,
        *args,
        alignment=np.int64(plan.config.alignment),
        capacity=np.int64(plan.capacity),
        zero_tail=plan.config.tail == "zero",
        num_sms=np.int64(plan.config.num_sms or MAX_INT32),
        force_vector=_is_set(FORCE_VECTOR),
    )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "0") != "0"


def _row_bytes(leaf: Array) -> int:
    return leaf.dtype.itemsize * math.prod(leaf.shape[1:])


def _like(array: Array, shape: tuple[int, ...], dtype: Any) -> Any:
    """A result type that varies on the mesh axes of the array, as that of any op on it: inside of
    shard_map(check_vma=False) none does, whatever the array itself comes with from outside."""
    of_an_op = jax.typeof(lax.expand_dims(array, (0,)))
    return of_an_op.update(shape=shape, dtype=jnp.dtype(dtype))


# What the kernels do not support, as the text of an error.


def _why_no_rows(op: str, leaves: tuple[Array, ...]) -> str | None:
    for leaf in leaves:
        row_bytes = _row_bytes(leaf)
        if row_bytes % ROW_BYTES_MULTIPLE or jnp.issubdtype(leaf.dtype, jnp.bool_):
            return (
                f"jax_moe_ep.{op}: the CUDA kernels move rows of a multiple of "
                f"{ROW_BYTES_MULTIPLE} bytes of numbers, got {leaf.dtype}{list(leaf.shape)} with "
                f"{row_bytes} bytes a row. Pad the rows, or use implementation='reference'"
            )
    return None


def _why_no_sums(op: str, y: Array) -> str | None:
    if y.dtype not in (jnp.float32, jnp.float16, jnp.bfloat16):
        return (
            f"jax_moe_ep.{op}: the CUDA kernels sum float32, float16 and bfloat16, got {y.dtype}. "
            "Convert y, or use implementation='reference'"
        )
    return _why_no_rows(op, (y,))


def _why_no_weights(weights: Array) -> str | None:
    if weights.dtype.itemsize not in (2, 4):
        return (
            "jax_moe_ep.row_weights: the CUDA kernels take weights of 2 or 4 bytes, got "
            f"{weights.dtype}. Convert them, or use implementation='reference'"
        )
    return None


def _implementation(op: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    return kernel if _ffi is not None else refused(getattr(reference, op), _no_extension(op))


plan = _implementation("plan", _plan_kernel)
dispatch = _implementation("dispatch", _dispatch_kernel)
combine = _implementation("combine", _combine_kernel)
combine_backward = _implementation("combine_backward", _combine_backward_kernel)
row_weights = _implementation("row_weights", _row_weights_kernel)
row_weights_backward = _implementation("row_weights_backward", _row_weights_backward_kernel)
