"""A whole Mixture-of-Experts feed-forward layer on global arrays."""

import functools
import math
from collections.abc import Callable
from typing import Literal, NoReturn, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jax_moe_ep import ops
from jax_moe_ep.checks import (
    axis_names,
    check_choice,
    check_config,
    check_experts_of_ranks,
    check_integers,
)
from jax_moe_ep.config import EpConfig
from jax_moe_ep.grouped_matmul import grouped_matmul
from jax_moe_ep.plan import Stats

Activation = Literal["swiglu", "geglu"]

_GATES: dict[str, Callable[[Array], Array]] = {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu}


def moe_mlp(
    x: Float[Array, "... H"],
    topk_idx: Int[Array, "... K"],
    topk_weights: Float[Array, "... K"],
    w_gate_up: Float[Array, "E H 2F"],
    w_down: Float[Array, "E F H"],
    *,
    mesh: Mesh,
    config: EpConfig,
    activation: Activation = "swiglu",
    token_axes: str | tuple[str, ...] | None = None,
) -> tuple[Float[Array, "... H"], Stats]:
    """Dispatch, gated experts and weighted combine, with the shard_map inside.

    For every token: sum over k of w[k] * (act(x @ gate) * (x @ up)) @ down of expert topk_idx[k],
    where gate and up are the two halves of w_gate_up[e]. On CUDA the experts run through
    `tokamax.ragged_dot`, elsewhere through `jax.lax.ragged_dot`; on Hopper the gradient of expert
    weights in bf16 and fp16 is `transposed_ragged_dot` of jax.experimental.pallas. For these dtypes
    the kernels want C, H and F to be multiples of 64: on CUDA, arrays with others are copied,
    padded with zeros.

    Args:
      x: [..., H] tokens; the first dimension is sharded over token_axes.
      topk_idx: [..., K] int32 or int64; ids outside [0, E) are "no expert".
      topk_weights: [..., K] floating. With drop_policy="priority" they are the priority too.
      w_gate_up: [E, H, 2F], in x's dtype, sharded over the EP axes.
      w_down: [E, F, H], in x's dtype, sharded over the EP axes.
      mesh: has the axes of the config and token_axes. Other axes compute the same.
      config: the options of the EP group.
      activation: "swiglu" (SiLU) or "geglu" (tanh GELU) on the gate.
      token_axes: the mesh axes that shard the first dimension of x, the EP axes among them.
        None: all axes of the mesh.

    Returns:
      [..., H] in x's dtype, sharded like x, and the `Stats` of the routing.

    Differentiable in x, topk_weights and the expert weights.

    Raises:
      TypeError, ValueError: for shapes, dtypes, mesh axes or options that do not fit.
      NotImplementedError: on CUDA when tokamax is not installed.
    """
    axes = _token_axes(mesh, config, token_axes)
    check_choice("jax_moe_ep.moe_mlp", "activation", activation, tuple(_GATES))
    _check_tokens(x, topk_idx, topk_weights, mesh, axes)
    _check_experts(x, w_gate_up, w_down, config)
    tokens, experts = P(axes), P(config.axes)
    in_specs = (tokens, tokens, tokens, experts, experts)

    def layer(
        x: Array, topk_idx: Array, topk_weights: Array, w_gate_up: Array, w_down: Array
    ) -> tuple[Array, Stats]:
        idx = topk_idx.reshape(-1, topk_idx.shape[-1])
        weights = topk_weights.reshape(idx.shape)
        priority = weights if config.drop_policy == "priority" else None
        plan = ops.plan(idx, config, priority=priority)
        rows = ops.dispatch(x.reshape(-1, x.shape[-1]), plan)
        matmul = functools.partial(
            grouped_matmul, group_sizes=plan.group_sizes, alignment=config.alignment
        )
        gate, up = jnp.split(matmul(rows, w_gate_up), 2, axis=-1)
        y = matmul(_GATES[activation](gate) * up, w_down)
        out = ops.combine(y, plan, weights)
        return out.reshape(x.shape), ops.stats(plan, axis_name=axes)

    args = (x, topk_idx, topk_weights, w_gate_up, w_down)
    if AxisType.Explicit in mesh.axis_types:  # such a mesh never reshards by itself
        pairs = zip(args, in_specs, strict=True)
        args = tuple(jax.reshard(arg, NamedSharding(mesh, spec)) for arg, spec in pairs)
    # tokamax's kernels do not say on which axes their results vary: no check_vma.
    return jax.shard_map(
        layer, mesh=mesh, in_specs=in_specs, out_specs=(tokens, P()), check_vma=False
    )(*args)


# Checks.


def _fail(text: str) -> NoReturn:
    raise ValueError(f"jax_moe_ep.moe_mlp: {text}")


def _token_axes(
    mesh: Mesh, config: EpConfig, token_axes: str | tuple[str, ...] | None
) -> tuple[str, ...]:
    check_config("moe_mlp", config)
    if not isinstance(cast("object", mesh), (Mesh, AbstractMesh)):
        raise TypeError(f"jax_moe_ep.moe_mlp: mesh must be a jax.sharding.Mesh, got {mesh!r}")
    if token_axes is None:
        axes = tuple(mesh.axis_names)
    else:
        axes = axis_names("moe_mlp", token_axes, name="token_axes")
    for axis in (*config.axes, *axes):
        if axis not in mesh.axis_names:
            _fail(f"axis {axis!r} is not in the mesh, which has {mesh.axis_names}")
    if missing := set(config.axes) - set(axes):
        _fail(f"token_axes={token_axes} must contain the EP axes; {sorted(missing)} are missing")
    check_experts_of_ranks("moe_mlp", config, _num_shards(mesh, config.axes))
    return axes


def _num_shards(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _check_tokens(
    x: Array, topk_idx: Array, topk_weights: Array, mesh: Mesh, axes: tuple[str, ...]
) -> None:
    check_integers(
        "moe_mlp", "topk_idx", topk_idx, ". dense_to_topk makes ids and weights of a bool map"
    )
    if topk_idx.shape[:-1] != x.shape[:-1] or topk_weights.shape != topk_idx.shape:
        _fail(
            "x [..., H], topk_idx [..., K] and topk_weights [..., K] must agree, got "
            f"{x.shape}, {topk_idx.shape} and {topk_weights.shape}"
        )
    if x.ndim < 2 or 0 in (x.shape[-1], topk_idx.shape[-1]):
        _fail(
            f"x must be [..., H] and topk_idx [..., K] with H and K >= 1, got {x.shape} and "
            f"{topk_idx.shape}"
        )
    shards = _num_shards(mesh, axes)
    if x.shape[0] % shards:
        _fail(
            f"the first dimension of x, {x.shape[0]}, must be a multiple of the {shards} shards "
            f"of axes {axes}. Pad it with tokens whose topk_idx is -1"
        )


def _check_experts(x: Array, w_gate_up: Array, w_down: Array, config: EpConfig) -> None:
    experts, hidden = config.num_experts, x.shape[-1]
    inner = w_gate_up.shape[-1] // 2 if w_gate_up.ndim else 0
    if w_gate_up.shape != (experts, hidden, 2 * inner) or inner == 0:
        _fail(
            f"with E = {experts} and H = {hidden}, w_gate_up must be [E, H, 2F] with F >= 1, got "
            f"{w_gate_up.shape}"
        )
    if w_down.shape != (experts, inner, hidden):
        _fail(f"w_down must be [E, F, H] = {(experts, inner, hidden)}, got {w_down.shape}")
    if not x.dtype == w_gate_up.dtype == w_down.dtype:
        raise TypeError(
            "jax_moe_ep.moe_mlp: x, w_gate_up and w_down must have one dtype, got "
            f"{x.dtype}, {w_gate_up.dtype} and {w_down.dtype}"
        )
