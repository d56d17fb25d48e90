"""Expert-parallel dispatch and combine for Mixture-of-Experts models in JAX."""

from jax_moe_ep.config import EpConfig
from jax_moe_ep.moe import moe_mlp
from jax_moe_ep.ops import combine, dispatch, plan, row_sources, row_weights, stats
from jax_moe_ep.plan import Plan, Stats

__version__ = "0.1.0"

__all__ = [
    "EpConfig",
    "Plan",
    "Stats",
    "combine",
    "dispatch",
    "moe_mlp",
    "plan",
    "row_sources",
    "row_weights",
    "stats",
]
