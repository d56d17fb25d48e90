"""From router logits to experts and weights.

Plain JAX in float32, whatever the dtype of the logits; on global arrays under jit, or inside
shard_map. `...` are any leading dimensions, [T] or [B, S]. K is top-k, E the number of experts.
"""

import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from jax_moe_ep.checks import check_choice
from jax_moe_ep.config import MAX_INT32

Score = Literal["softmax", "sigmoid"]
GroupScore = Literal["max", "top2"]

LOWEST = float(jnp.finfo(jnp.float32).min)


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """Options of a router. Frozen and hashable, so it can be a static argument.

    Args:
      top_k: K, the experts of one token.
      score: what makes scores of logits, over all experts: "softmax" or "sigmoid".
      normalize: divide the scores of the chosen experts by their sum. With "softmax" that is the
        softmax of the chosen logits, as in Mixtral. True by default, as in most models (Mixtral,
        Qwen3, DeepSeek-V3); False for Switch, DeepSeek-V2, and whenever top_k is 1.
      scale: what all weights are multiplied by in the end.
      num_groups: the experts form so many groups of consecutive ones, of equal size.
      top_groups: how many of the groups a token may choose from.
      group_score: which groups are best: those with the best expert ("max", DeepSeek-V2) or the
        best sum of two experts ("top2", DeepSeek-V3).

    Raises:
      TypeError, ValueError: naming the option, what was given and what is allowed.
    """

    top_k: int
    _: dataclasses.KW_ONLY
    score: Score = "softmax"
    normalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = "top2"

    def __post_init__(self) -> None:
        for name in ("top_k", "num_groups", "top_groups"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"RouterConfig: {name} must be an int, got {value!r}")
            if not 1 <= value <= MAX_INT32:
                raise ValueError(
                    f"RouterConfig: {name} must be between 1 and {MAX_INT32}, got {value}"
                )
        check_choice("RouterConfig", "score", self.score, get_args(Score))
        check_choice("RouterConfig", "group_score", self.group_score, get_args(GroupScore))
        if type(self.normalize) is not bool:
            raise TypeError(f"RouterConfig: normalize must be a bool, got {self.normalize!r}")
        scale: Any = self.scale
        if type(scale) not in (int, float):
            raise TypeError(f"RouterConfig: scale must be a number, got {scale!r}")
        if not 0 < scale < math.inf:
            raise ValueError(f"RouterConfig: scale must be positive and finite, got {scale!r}")
        if self.top_groups > self.num_groups:
            raise ValueError(
                f"RouterConfig: top_groups={self.top_groups} exceeds num_groups={self.num_groups}"
            )
        if self.normalize and self.top_k == 1:
            raise ValueError(
                "RouterConfig: normalize=True with top_k=1 makes every weight 1 and leaves the "
                "router without a gradient. Set normalize=False"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """What a router decided: the arguments of `plan` and `combine`, and the scores behind them.

    Attributes:
      topk_idx: [..., K] int32, different experts, best first; -1 for all K of a masked token.
      topk_weights: [..., K] float32; 0 for a masked token.
      scores: [..., E] float32, before bias, normalization and scale; 0 for a masked token.
    """

    topk_idx: Int32[Array, "... K"]
    topk_weights: Float32[Array, "... K"]
    scores: Float32[Array, "... E"]


def route(
    logits: Float[Array, "... E"],
    config: RouterConfig,
    *,
    bias: Float[Array, "E"] | None = None,
    mask: Bool[Array, "..."] | None = None,
) -> Routing:
    """Chooses K experts for every token and weighs them.

    `scores = softmax(logits); topk_idx = top_k(scores + bias, K)[1]` among the experts of the best
    groups; `w = take_along_axis(scores, topk_idx, -1); topk_weights = scale * w / w.sum(-1)`.
    Computed from the logarithms of the scores, so that scores which underflow have weights too.
    Ties go to the lowest index, of groups and of experts.

    Args:
      logits: [..., E] floating. A logit of -inf has score 0. NaN stays in its token (softmax) or
        expert (sigmoid) and is chosen last; what is chosen is always K different experts.
      config: the options of the router.
      bias: [E] floating, added to the scores where experts and groups are chosen and nowhere
        else: no gradient. See `update_bias`.
      mask: [...] bool, False for tokens that are not routed, whose logits are never read.

    Returns:
      The `Routing`.

    Differentiable in logits, through topk_weights and scores; exact zeros at masked tokens.

    Raises:
      TypeError, ValueError: for a wrong shape or dtype, or groups that do not fit E.

    Groups are those of DeepSeek-V2 (arXiv:2405.04434, 2.1.3) and V3 (arXiv:2412.19437, 2.1.2).

    Example:
      >>> import jax.numpy as jnp, jax_moe_ep as ep
      >>> routing = ep.route(jnp.array([[0.0, 2.0, 1.0, 2.0]]), ep.RouterConfig(2))
      >>> routing.topk_idx, routing.topk_weights
      (Array([[1, 3]], dtype=int32), Array([[0.5, 0.5]], dtype=float32))
    """
    _check_route(logits, config, bias, mask)
    logits = unmasked(logits, mask)
    log_scores = (
        jax.nn.log_softmax(logits) if config.score == "softmax" else jax.nn.log_sigmoid(logits)
    )
    scores = jnp.exp(log_scores)
    choice = scores if bias is None else scores + bias.astype(jnp.float32)
    topk_idx = _best_experts(lax.stop_gradient(choice), config)
    chosen = jnp.take_along_axis(log_scores, topk_idx, axis=-1)
    weights = config.scale * (jax.nn.softmax(chosen) if config.normalize else jnp.exp(chosen))
    if mask is not None:
        is_token = mask[..., None]
        topk_idx = jnp.where(is_token, topk_idx, -1)
        weights, scores = jnp.where(is_token, weights, 0), jnp.where(is_token, scores, 0)
    return Routing(topk_idx, weights, scores)


def unmasked(logits: Float[Array, "... E"], mask: Array | None) -> Float32[Array, "... E"]:
    """The logits in float32, 0 at masked tokens, which cuts them off from every gradient."""
    logits = logits.astype(jnp.float32)
    return logits if mask is None else jnp.where(mask[..., None], logits, 0)


def _best_experts(choice: Float32[Array, "... E"], config: RouterConfig) -> Int32[Array, "... K"]:
    """The K best experts of the best groups."""
    # NaN and -inf come last among the eligible; those of other groups get -inf, which is lower.
    choice = jnp.where(choice >= LOWEST, choice, LOWEST)
    if config.num_groups > 1:
        shape = (config.num_groups, choice.shape[-1] // config.num_groups)
        groups = choice.reshape(*choice.shape[:-1], *shape)
        best = lax.top_k(groups, 1 if config.group_score == "max" else 2)[0].sum(-1)
        chosen = lax.top_k(best, config.top_groups)[1]
        is_eligible = jax.nn.one_hot(chosen, config.num_groups, dtype=jnp.bool_).any(-2)
        choice = jnp.where(is_eligible[..., None], groups, -jnp.inf).reshape(choice.shape)
    return lax.top_k(choice, config.top_k)[1]


def check_floating(op: str, name: str, x: Any) -> None:
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise TypeError(f"jax_moe_ep.{op}: {name} must be floating, got {jnp.result_type(x)}")
    if jnp.ndim(x) < 1:
        raise ValueError(f"jax_moe_ep.{op}: {name} must have a last dimension of E experts")


def check_mask(op: str, mask: Any, shape: tuple[int, ...]) -> None:
    if mask is None:
        return
    if jnp.result_type(mask) != jnp.bool_:
        raise TypeError(
            f"jax_moe_ep.{op}: mask must be bool, True for real tokens, got "
            f"{jnp.result_type(mask)}. Write mask != 0"
        )
    if jnp.shape(mask) != shape:
        raise ValueError(
            f"jax_moe_ep.{op}: mask must have a bool for every token, {shape}, got shape "
            f"{jnp.shape(mask)}"
        )


def _check_route(logits: Any, config: Any, bias: Any, mask: Any) -> None:
    if not isinstance(config, RouterConfig):
        raise TypeError(f"jax_moe_ep.route: config must be a RouterConfig, got {config!r}")
    check_floating("route", "logits", logits)
    check_mask("route", mask, jnp.shape(logits)[:-1])
    num_experts = jnp.shape(logits)[-1]
    group_size, rest = divmod(num_experts, config.num_groups)
    if rest:
        raise ValueError(
            f"jax_moe_ep.route: E = {num_experts} experts are not a multiple of "
            f"num_groups={config.num_groups}; all groups have one size"
        )
    if config.num_groups > 1 and config.group_score == "top2" and group_size < 2:
        raise ValueError(
            f"jax_moe_ep.route: group_score='top2' needs groups of 2 experts or more, got "
            f"{num_experts} experts in {config.num_groups} groups. Use group_score='max'"
        )
    if config.top_k > config.top_groups * group_size:
        raise ValueError(
            f"jax_moe_ep.route: top_k={config.top_k} exceeds the {config.top_groups * group_size} "
            f"experts a token may choose from: {num_experts} experts, {config.top_groups} of "
            f"{config.num_groups} groups"
        )
    if bias is not None:
        check_floating("route", "bias", bias)
        if jnp.shape(bias) != (num_experts,):
            raise ValueError(
                f"jax_moe_ep.route: bias must be [E] = ({num_experts},) as in logits, got shape "
                f"{jnp.shape(bias)}"
            )
