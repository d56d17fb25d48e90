"""The XLA custom calls of this library."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def custom_call(target: str, result_types: Any) -> Callable[..., Any]:
    """jax.ffi.ffi_call, made once whatever becomes of its results."""
    call = jax.ffi.ffi_call(target, result_types)
    return lambda *args, **attributes: called_once(call(*args, **attributes))


def called_once(results: Any) -> Any:
    """Results of a custom call, behind a barrier that costs nothing.

    A scan that is differentiated saves some of them. XLA of jaxlib 0.11.2 lets the call write into
    what is saved, and makes it a second time for its other uses (openxla/xla pull request 45799).
    """
    return lax.optimization_barrier(results)
