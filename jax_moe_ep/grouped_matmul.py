"""The matmul of experts: rows in groups, each times its own weights."""

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import backend
from jaxtyping import Array, Float, Int32

from jax_moe_ep.custom_call import called_once
from jax_moe_ep.refusal import refused

# What the kernels for bf16 and fp16 want dimensions to be multiples of: their tiles are 128 bytes
# wide. C as well, over which the gradient of the weights is a sum.
_TILE = 64


class _Backend(NamedTuple):
    matmul: Callable[[Array, Array, Array], Array]  # rows, weights, group_sizes
    # Those of rows and weights, from whether groups are whole tiles of rows, these three and the
    # gradient of the result.
    gradients: Callable[[bool, Array, Array, Array, Array], tuple[Array, Array]]


def grouped_matmul(
    rows: Float[Array, "C M"],
    weights: Float[Array, "L M N"],
    group_sizes: Int32[Array, "L"],
    *,
    alignment: int = 1,
) -> Float[Array, "C N"]:
    """The rows of each group times its weights; rows behind the groups are undefined.

    On CUDA tokamax's, elsewhere lax.ragged_dot. Differentiable in rows and weights; in the
    gradient of rows, those behind the groups are undefined too. Rows that are not finite may make
    the gradient of the next groups' weights NaN as well.

    Args:
      rows, weights, group_sizes: see their shapes; the groups are the first rows.
      alignment: all group_sizes are multiples of it. Where it is a multiple of 64, on Hopper in
        bf16 and fp16, no rows are copied to drop those behind the groups.
    """
    out: Array = _grouped_matmul(alignment % _TILE == 0, rows, weights, group_sizes)
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(is_tiled: bool, rows: Array, weights: Array, group_sizes: Array) -> Array:
    cuda, default = _backends()

    def on_cuda(*args: Array) -> Array:
        return called_once(cuda.matmul(*args))

    return lax.platform_dependent(rows, weights, group_sizes, cuda=on_cuda, default=default.matmul)


def _forward(
    is_tiled: bool, rows: Array, weights: Array, group_sizes: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    out: Array = _grouped_matmul(is_tiled, rows, weights, group_sizes)
    return out, (rows, weights, group_sizes)


def _backward(
    is_tiled: bool, residuals: tuple[Array, Array, Array], dout: Array
) -> tuple[Array, Array, None]:
    cuda, default = (functools.partial(each.gradients, is_tiled) for each in _backends())
    drows, dweights = lax.platform_dependent(*residuals, dout, cuda=cuda, default=default)
    return drows, dweights, None


_grouped_matmul.defvjp(_forward, _backward)


def _backends() -> tuple[_Backend, _Backend]:
    """For CUDA and for other platforms."""
    default = _differentiated(lax.ragged_dot)
    if importlib.util.find_spec("tokamax") is not None:
        # Of the device that tokamax too chooses its kernel by.
        is_hopper = getattr(backend.get_default_device(), "compute_capability", "").startswith("9.")
        return _HOPPER if is_hopper else _differentiated(_tokamax_ragged_dot), default
    missing = refused(
        lax.ragged_dot,
        "jax_moe_ep.moe_mlp: on CUDA the experts need tokamax, which is not installed. "
        "pip install tokamax, or call plan, dispatch and combine around experts of your own",
    )
    return _differentiated(missing), default


def _differentiated(matmul: Callable[..., Array]) -> _Backend:
    def gradients(
        is_tiled: bool, rows: Array, weights: Array, group_sizes: Array, dout: Array
    ) -> tuple[Array, Array]:
        rows, dout = _without_tail(group_sizes, rows, dout)
        # The unused forward pass is dead code.
        return jax.vjp(lambda *args: matmul(*args, group_sizes), rows, weights)[1](dout)

    return _Backend(matmul, gradients)


def _without_tail(group_sizes: Array, *arrays: Array) -> list[Array]:
    """Zeros behind the groups: rows there may be NaN, and kernels multiply some of them by zero for
    the gradient of the weights."""
    is_grouped = jnp.arange(arrays[0].shape[0]) < jnp.sum(group_sizes)
    return [jnp.where(is_grouped[:, None], each, 0) for each in arrays]


def _tokamax_ragged_dot(rows: Array, weights: Array, group_sizes: Array) -> Array:
    import tokamax  # pyright: ignore[reportMissingImports]  # only CUDA installs have it

    num_rows, num_columns = rows.shape[0], weights.shape[2]
    if rows.dtype.itemsize == 2:
        rows, weights = _pad_to_tiles(rows, (0, 1)), _pad_to_tiles(weights, (1, 2))
    return tokamax.ragged_dot(rows, weights, group_sizes)[:num_rows, :num_columns]


def _hopper_gradients(
    is_tiled: bool, rows: Array, weights: Array, group_sizes: Array, dout: Array
) -> tuple[Array, Array]:
    """In bf16 and fp16 that of the weights is JAX's own kernel. tokamax 0.0.17's loads operands
    into registers that the tensor cores still read: on a busy GPU its sums are wrong."""
    if rows.dtype.itemsize != 2:
        tokamax = _differentiated(_tokamax_ragged_dot)
        return tokamax.gradients(is_tiled, rows, weights, group_sizes, dout)
    if not is_tiled:  # whole tiles are all that the kernels read of a group
        rows, dout = _without_tail(group_sizes, rows, dout)
    _, pull = jax.vjp(lambda rows: _tokamax_ragged_dot(rows, weights, group_sizes), rows)
    return *pull(dout), _transposed_ragged_dot(rows, dout, group_sizes)


_HOPPER = _Backend(_tokamax_ragged_dot, _hopper_gradients)


def _transposed_ragged_dot(
    rows: Float[Array, "C M"], dout: Float[Array, "C N"], group_sizes: Int32[Array, "L"]
) -> Float[Array, "L M N"]:
    """Of each group, the transposed rows times dout. Whole tiles of rows are read: what the last
    tile of a group has of others must be finite."""
    # Imports JAX's test utilities, and so absl, which comes with tokamax.
    from jax.experimental.pallas.ops.gpu import transposed_ragged_dot_mgpu as kernels

    num_inner, num_columns = rows.shape[1], dout.shape[1]
    rows, dout = (_pad_to_tiles(each, (0, 1)) for each in (rows, dout))
    block_m, block_n = (
        2 * _TILE if each.shape[1] % (2 * _TILE) == 0 else _TILE for each in (rows, dout)
    )
    dweights = kernels.transposed_ragged_dot(
        rows,
        dout,
        group_sizes=group_sizes,
        block_m=block_m,
        block_n=block_n,
        block_k=_TILE,
        max_concurrent_steps=4,
        grid_block_n=8,
    )
    return dweights[:, :num_inner, :num_columns]


def _pad_to_tiles(x: Array, axes: tuple[int, ...]) -> Array:
    """Zeros behind x: at least one tile along each of the axes, and only whole ones."""
    padding = [(0, 0)] * x.ndim
    for axis in axes:
        padding[axis] = (0, -x.shape[axis] % _TILE if x.shape[axis] else _TILE)
    return jnp.pad(x, padding)
