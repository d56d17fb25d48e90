"""Ops that cannot run on a platform: an error when they are lowered for it, not before."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

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
