"""What keeps the load of the experts even: counts, auxiliary losses and the bias of selection.

Plain JAX; on global arrays under jit, or inside shard_map, where statistics are totalled over
`axis_name`. The letters are K top-k, E experts, S tokens of a sequence.
"""

from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from jax_moe_ep.checks import (
    axis_names,
    check_axes,
    check_choice,
    check_integers,
    check_num_experts,
)
from jax_moe_ep.ids import as_ids
from jax_moe_ep.routing import Routing, check_floating, check_mask, unmasked

Per = Literal["batch", "sequence"]
AxisName = str | tuple[str, ...]

# Scores that sum to less count as nothing. Gradients divide by the square, which is still normal.
SMALLEST_SUM = 2.0**-60


def expert_counts(
    topk_idx: Int[Array, "..."], num_experts: int, *, axis_name: AxisName = ()
) -> Int32[Array, "E"]:
    """How many assignments name each expert.

    Args:
      topk_idx: [...] int32 or int64; ids outside [0, E) are "no expert".
      num_experts: E.
      axis_name: the mesh axes that shard the tokens; the counts are totalled over them.

    Returns:
      [E] int32. No gradient.

    Raises:
      TypeError, ValueError: for ids of another dtype, num_experts, or an axis that is not bound.
    """
    check_integers("expert_counts", "topk_idx", topk_idx)
    check_num_experts("expert_counts", num_experts)
    counts = _counts(as_ids(topk_idx), num_experts)
    return _total("expert_counts", counts, axis_name)


def load_balance_loss(
    routing: Routing,
    *,
    mask: Bool[Array, "..."] | None = None,
    per: Per = "batch",
    axis_name: AxisName = (),
    sequence_axis_name: AxisName = (),
) -> Float32[Array, ""]:
    """The auxiliary loss of Switch: 1 where the load is even, up to E where it is not.

    `E * sum(f * P)`: f[e] is the share of the assignments that name e, P[e] the mean over the
    tokens of `scores[e] / scores.sum()`. Without the factor alpha.

    Args:
      routing: of the batch. Its masked tokens do not count.
      mask: [...] bool, False for further tokens that do not count.
      per: "batch", or "sequence": scores are [..., S, E], and the loss is the mean of that of each
        sequence that has tokens.
      axis_name: the mesh axes that shard the tokens, or, per sequence, the sequences.
      sequence_axis_name: per sequence, the mesh axes that shard S.

    Returns:
      [] float32; 0 without any token.

    Differentiable in routing.scores; f is a constant.

    Raises:
      TypeError, ValueError: for a wrong shape, dtype or option, or an axis that is not bound.

    Fedus, Zoph and Shazeer, "Switch Transformers", JMLR 2022, equations 4 to 6; per sequence
    DeepSeek-V3, arXiv:2412.19437, equations 17 to 20.
    """
    op = "load_balance_loss"
    _check_balance(routing, mask, per, axis_name, sequence_axis_name)
    idx, scores = routing.topk_idx, routing.scores
    num_experts = scores.shape[-1]
    is_token = ((idx >= 0) & (idx < num_experts)).any(-1)
    if mask is not None:
        is_token &= mask
    idx, scores = jnp.where(is_token[..., None], idx, -1), jnp.where(is_token[..., None], scores, 0)
    shares = scores / jnp.maximum(scores.sum(-1, keepdims=True), SMALLEST_SUM)

    # The statistics of the batch, or of every sequence; then their mean.
    tokens = tuple(range(is_token.ndim)) if per == "batch" else (is_token.ndim - 1,)
    inside, across = (axis_name, ()) if per == "batch" else (sequence_axis_name, axis_name)
    count = partial(_counts, num_experts=num_experts)
    for _ in range(is_token.ndim - len(tokens)):
        count = jax.vmap(count)
    statistics = (
        count(idx),
        shares.sum(tokens),
        is_token.sum(tokens, dtype=jnp.int32)[..., None],
    )
    counts, shares, num_tokens = _total(op, statistics, inside)
    f = counts.astype(jnp.float32) / _at_least_one(counts.sum(-1, keepdims=True))
    losses = num_experts * (f * shares / _at_least_one(num_tokens)).sum(-1)
    num_losses = (num_tokens > 0).sum(dtype=jnp.int32)
    loss, num_losses = _total(op, (losses.sum(), num_losses), across)
    return loss / _at_least_one(num_losses)


def z_loss(
    logits: Float[Array, "... E"],
    *,
    mask: Bool[Array, "..."] | None = None,
    axis_name: AxisName = (),
) -> Float32[Array, ""]:
    """The mean over the tokens of `logsumexp(logits)**2`, which keeps logits small.

    Args:
      logits: [..., E] floating.
      mask: [...] bool, False for tokens that do not count, whose logits are never read.
      axis_name: the mesh axes that shard the tokens.

    Returns:
      [] float32; 0 without any token.

    Differentiable in logits.

    Raises:
      TypeError, ValueError: for a wrong shape or dtype, or an axis that is not bound.

    Zoph et al., "ST-MoE", arXiv:2202.08906, equation 5.
    """
    check_floating("z_loss", "logits", logits)
    check_mask("z_loss", mask, jnp.shape(logits)[:-1])
    squares = jax.nn.logsumexp(unmasked(logits, mask), axis=-1) ** 2
    is_token = jnp.ones(squares.shape, bool) if mask is None else mask
    sums = (jnp.where(is_token, squares, 0).sum(), is_token.sum(dtype=jnp.int32))
    total, num_tokens = _total("z_loss", sums, axis_name)
    return total / _at_least_one(num_tokens)


def update_bias(
    bias: Float[Array, "E"], expert_counts: Int[Array, "E"], *, rate: float
) -> Float[Array, "E"]:
    """Moves the bias of `route` towards even load: `bias + rate * sign(mean(counts) - counts)`.

    Args:
      bias: [E] floating.
      expert_counts: [E] integer, of the whole batch; at most 2^31 - 1 in total.
      rate: the step; 0.001 in DeepSeek-V3.

    Returns:
      [E] in the dtype of bias: the bias of the next step.

    Raises:
      TypeError, ValueError: for a wrong shape or dtype.

    Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for MoE", arXiv:2408.15664.
    """
    check_floating("update_bias", "bias", bias)
    if not jnp.issubdtype(jnp.result_type(expert_counts), jnp.integer):
        raise TypeError(
            f"jax_moe_ep.update_bias: expert_counts must be integers, got "
            f"{jnp.result_type(expert_counts)}"
        )
    if jnp.ndim(bias) != 1 or jnp.shape(bias) != jnp.shape(expert_counts):
        raise ValueError(
            f"jax_moe_ep.update_bias: bias and expert_counts must be [E], got {jnp.shape(bias)} "
            f"and {jnp.shape(expert_counts)}"
        )
    # In integers: a rounded mean would push experts that have exactly the mean. Compared, not
    # subtracted: they may be unsigned.
    mean, rest = jnp.divmod(expert_counts.sum(), bias.size)
    is_below = (expert_counts < mean) | ((expert_counts == mean) & (rest > 0))
    step = is_below.astype(bias.dtype) - (expert_counts > mean).astype(bias.dtype)
    return bias + jnp.asarray(rate, bias.dtype) * step


def _counts(idx: Int[Array, "..."], num_experts: int) -> Int32[Array, "E"]:
    idx = jnp.where((idx >= 0) & (idx < num_experts), idx, num_experts)  # one past: dropped
    # Explicit sharding has to be told where the counts of sharded tokens go: everywhere.
    is_explicit = AxisType.Explicit in jax.typeof(idx).sharding.mesh.axis_types
    zeros, out = jnp.zeros(num_experts, jnp.int32), P() if is_explicit else None
    return zeros.at[idx].add(1, mode="drop", out_sharding=out)


def _at_least_one(count: Int[Array, "..."]) -> Float32[Array, "..."]:
    return jnp.maximum(count, 1).astype(jnp.float32)


def _total(op: str, tree: Any, axis_name: AxisName) -> Any:
    return lax.psum(
        tree, check_axes(op, axis_name, otherwise=", or leave it out for global arrays")
    )


def _check_balance(
    routing: Any, mask: Any, per: str, axis_name: AxisName, sequence_axis_name: AxisName
) -> None:
    op = "load_balance_loss"
    if not isinstance(routing, Routing):
        raise TypeError(f"jax_moe_ep.{op}: routing must be a Routing, got {type(routing).__name__}")
    check_choice(f"jax_moe_ep.{op}", "per", per, get_args(Per))
    idx, scores = routing.topk_idx, routing.scores
    if idx.ndim < 1 or idx.shape[:-1] != scores.shape[:-1]:
        raise ValueError(
            f"jax_moe_ep.{op}: topk_idx [..., K] and scores [..., E] of routing must agree, got "
            f"shapes {idx.shape} and {scores.shape}"
        )
    check_mask(op, mask, scores.shape[:-1])
    if per == "sequence" and routing.scores.ndim < 2:
        raise ValueError(
            f"jax_moe_ep.{op}: per='sequence' needs scores [..., S, E], got shape "
            f"{routing.scores.shape}"
        )
    if per == "batch" and sequence_axis_name:
        raise ValueError(
            f"jax_moe_ep.{op}: sequence_axis_name={sequence_axis_name!r} is given, but per='batch' "
            "has no sequences. Name the axis in axis_name, or set per='sequence'"
        )
    if shared := {*axis_names(op, axis_name)} & {*axis_names(op, sequence_axis_name)}:
        raise ValueError(
            f"jax_moe_ep.{op}: {sorted(shared)} are in axis_name and in sequence_axis_name; an "
            "axis shards the sequences or the tokens of each"
        )
