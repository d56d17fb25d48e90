"""Which implementation of an op runs: `EpConfig.implementation`, on the platform at hand."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax
from jaxtyping import Array

from jax_moe_ep import cuda, reference
from jax_moe_ep.config import EpConfig
from jax_moe_ep.refusal import refused


def choose(op: str, config: EpConfig) -> Callable[..., Any]:
    """The op as `config.implementation` says; what cannot run is refused when it is lowered."""
    on_cuda, anywhere = getattr(cuda, op), getattr(reference, op)
    if config.implementation == "cuda":
        anywhere = refused(
            anywhere,
            f"jax_moe_ep.{op}: implementation='cuda' needs CUDA devices, and this program is "
            "compiled for another platform. Use implementation='auto' or 'reference'",
        )

    def run(*args: Any, **static: Any) -> Any:
        args = jax.tree.map(partial(_refuse_vmap, op), args)
        if config.implementation == "reference":
            return anywhere(*args, **static)
        return lax.platform_dependent(
            *args, cuda=partial(on_cuda, **static), default=partial(anywhere, **static)
        )

    return run


def _refuse_vmap(op: str, x: Array) -> Array:
    guard = jax.custom_batching.custom_vmap(lambda x: x)

    @guard.def_vmap
    def _(axis_size: int, in_batched: Any, x: Array) -> Any:
        raise NotImplementedError(
            f"jax_moe_ep.{op} cannot be vmapped: one call serves one batch of tokens. Reshape "
            "[B, S, ...] to [B*S, ...] before it, or loop with jax.lax.scan"
        )

    return guard(x)
