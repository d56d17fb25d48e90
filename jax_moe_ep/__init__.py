"""Expert-parallel dispatch and combine for Mixture-of-Experts models in JAX."""

from jax_moe_ep.arena import ArenaBytes, check, memory, reset
from jax_moe_ep.balance import expert_counts, load_balance_loss, update_bias, z_loss
from jax_moe_ep.config import EpConfig
from jax_moe_ep.maps import dense_to_topk, topk_to_dense
from jax_moe_ep.moe import moe_mlp
from jax_moe_ep.ops import combine, dispatch, plan, row_sources, row_weights, stats
from jax_moe_ep.permutation import permute, sort_chunks, unpermute
from jax_moe_ep.plan import Plan, Stats
from jax_moe_ep.routing import RouterConfig, Routing, route
from jax_moe_ep.tokens import mask_routing, merge_tokens, split_tokens

__version__ = "0.1.0"

__all__ = [
    "ArenaBytes",
    "EpConfig",
    "Plan",
    "RouterConfig",
    "Routing",
    "Stats",
    "check",
    "combine",
    "dense_to_topk",
    "dispatch",
    "expert_counts",
    "load_balance_loss",
    "mask_routing",
    "memory",
    "merge_tokens",
    "moe_mlp",
    "permute",
    "plan",
    "reset",
    "route",
    "row_sources",
    "row_weights",
    "sort_chunks",
    "split_tokens",
    "stats",
    "topk_to_dense",
    "unpermute",
    "update_bias",
    "z_loss",
]
