"""The experts' matmul: kernels that no machine without a GPU has are stood in for."""

import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ON_GPUS
from jax.experimental.pallas.ops.gpu import transposed_ragged_dot_mgpu as hopper_kernels

from jax_moe_ep import grouped_matmul as module
from jax_moe_ep.grouped_matmul import grouped_matmul


def by_groups(matmul, group_sizes, *arrays):
    """[L, ...]: the matmul of every group's rows of all arrays."""
    ends = np.cumsum(group_sizes)
    wide = [np.asarray(each, np.float32) for each in arrays]
    return [
        matmul(i, *(each[end - size : end] for each in wide))
        for i, (size, end) in enumerate(zip(group_sizes, ends, strict=True))
    ]


def expected_results(rows, weights, group_sizes, dout):
    """Of the grouped rows alone."""
    wide = np.asarray(weights, np.float32)
    return (
        np.concatenate(by_groups(lambda i, x: x @ wide[i], group_sizes, rows)),
        np.concatenate(by_groups(lambda i, d: d @ wide[i].T, group_sizes, dout)),
        np.stack(by_groups(lambda i, x, d: x.T @ d, group_sizes, rows, dout)),
    )


def results(rows, weights, group_sizes, dout, alignment):
    def matmul(rows, weights):
        return grouped_matmul(rows, weights, group_sizes, alignment=alignment)

    out, pull = jax.vjp(matmul, rows, weights)
    return out, *pull(dout)


def make_inputs(group_sizes, num_rows, inner, columns, dtype):
    """NaN behind the groups."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (num_rows, inner), (len(group_sizes), inner, columns), (num_rows, columns)
    rows, weights, dout = (
        jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)
    )
    is_grouped = (jnp.arange(num_rows) < sum(group_sizes))[:, None]
    rows, dout = (jnp.where(is_grouped, each, jnp.nan) for each in (rows, dout))
    return rows, weights * inner**-0.5, jnp.array(group_sizes, jnp.int32), dout


def assert_like_each_group_alone(
    group_sizes, num_rows, inner, columns, dtype=jnp.bfloat16, alignment=1
):
    """Some 2^3 roundings of 2^-9 relative to the largest value."""
    inputs = make_inputs(group_sizes, num_rows, inner, columns, dtype)
    expected = expected_results(inputs[0], inputs[1], group_sizes, inputs[3])
    num_grouped = sum(group_sizes)
    out, drows, dweights = jax.jit(results, static_argnums=4)(*inputs, alignment)
    actual = out[:num_grouped], drows[:num_grouped], dweights
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        limit = 2.0**-6 * np.abs(e).max(initial=0)
        np.testing.assert_allclose(np.asarray(a, np.float32), e, rtol=0, atol=limit)


RAGGED = [200, 0, 56, 1, 63]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize(
    ("group_sizes", "num_rows"),
    [(RAGGED, 320), (RAGGED, 500), ([0, 0], 64), ([0, 7], 7), ([64] * 3, 192)],
)
@pytest.mark.parametrize(("inner", "columns"), [(128, 192), (72, 10)])
def test_groups_of_any_size(group_sizes, num_rows, inner, columns, dtype):
    assert_like_each_group_alone(group_sizes, num_rows, inner, columns, dtype)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("alignment", [32, 64, 128])
def test_aligned_groups(dtype, alignment):
    group_sizes = [2 * alignment, 0, alignment, 5 * alignment]
    assert_like_each_group_alone(group_sizes, 1100, 128, 192, dtype, alignment)


@pytest.mark.skipif(not ON_GPUS, reason="needs a CUDA GPU")
@pytest.mark.parametrize("alignment", [1, 128])
def test_gradients_of_a_large_model(alignment):
    """tokamax's gradient of the weights was wrong here: more blocks than fit at once."""
    group_sizes = [1024 - 24 * i + 200 * (i % 3) for i in range(16)]
    group_sizes = [size // alignment * alignment for size in group_sizes]
    num_rows = sum(group_sizes) + 1000
    assert_like_each_group_alone(group_sizes, num_rows, 4096, 2048, alignment=alignment)


# The kernels for bf16 and fp16 on Hopper, as far as a machine without a GPU can have them.


def check_tiles(*sizes):
    if any(size == 0 or size % 64 for size in sizes):
        raise ValueError(f"no whole tiles: {sizes}")


@jax.custom_vjp
def hopper_ragged_dot(rows, weights, group_sizes):
    """lax.ragged_dot for whole tiles only, their TMA refuses others; nobody writes the tail."""
    check_tiles(*rows.shape, weights.shape[2])
    out = jax.lax.ragged_dot(rows, weights, group_sizes)
    is_grouped = jnp.arange(out.shape[0]) < jnp.sum(group_sizes)
    return jnp.where(is_grouped[:, None], out, jnp.nan)


def hopper_forward(rows, weights, group_sizes):
    return hopper_ragged_dot(rows, weights, group_sizes), (weights, group_sizes)


def hopper_backward(residuals, dout):
    """The gradient of the weights is not asked for: it is wrong."""
    weights, group_sizes = residuals
    drows = hopper_ragged_dot(dout, weights.mT, group_sizes)
    return drows, jnp.full_like(weights, jnp.nan), None


hopper_ragged_dot.defvjp(hopper_forward, hopper_backward)


def hopper_transposed_ragged_dot(
    rows, dout, *, group_sizes, block_m, block_n, block_k, max_concurrent_steps, grid_block_n
):
    """A product of the tiles that have rows of a group, those of others times zero."""
    check_tiles(*rows.shape, dout.shape[1], block_m, block_n, block_k)
    if rows.shape[1] % block_m or dout.shape[1] % block_n or rows.shape[0] % block_k:
        raise ValueError("no whole blocks")
    stages = max_concurrent_steps * block_k * (block_m + block_n)
    if 2 * (stages + block_m * block_n) > 227 * 1024 or grid_block_n < 1:
        raise ValueError("does not fit")
    places = jnp.arange(rows.shape[0])
    groups = jnp.searchsorted(jnp.cumsum(group_sizes), places, side="right")
    is_mine = groups == jnp.arange(group_sizes.size)[:, None]  # [L, C]
    has_mine = is_mine.reshape(group_sizes.size, -1, block_k).any(-1)
    is_read = has_mine.repeat(block_k, -1)[..., None]
    mine = jnp.where(is_read, rows * is_mine[..., None].astype(rows.dtype), 0)
    theirs = jnp.where(is_read, dout, 0)
    product = jnp.einsum("lch,lcf->lhf", mine, theirs, preferred_element_type=jnp.float32)
    return product.astype(rows.dtype)


@pytest.fixture
def hopper(monkeypatch):
    """These kernels on all platforms, as mocks."""
    jax.clear_caches()  # of the same shapes, traced with other kernels
    kernels = mock.Mock(wraps=hopper_ragged_dot), mock.Mock(wraps=hopper_transposed_ragged_dot)
    tokamax = types.SimpleNamespace(ragged_dot=kernels[0])
    monkeypatch.setitem(sys.modules, "tokamax", tokamax)
    monkeypatch.setattr(hopper_kernels, "transposed_ragged_dot", kernels[1])
    monkeypatch.setattr(module, "_backends", lambda: (module._HOPPER, module._HOPPER))
    yield kernels
    jax.clear_caches()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("group_sizes", "num_rows", "inner", "columns"),
    [(RAGGED, 500, 72, 10), (RAGGED, 320, 192, 128), ([0], 0, 8, 10), ([5, 0], 10, 128, 64)],
)
def test_the_kernels_of_hopper_get_whole_tiles_and_no_tail(
    hopper, group_sizes, num_rows, inner, columns, dtype
):
    assert_like_each_group_alone(group_sizes, num_rows, inner, columns, dtype)
    assert all(kernel.called for kernel in hopper)


@pytest.mark.parametrize(("alignment", "is_copied"), [(32, True), (64, False), (192, False)])
def test_whole_tiles_are_not_copied_for_the_kernels_of_hopper(
    hopper, monkeypatch, alignment, is_copied
):
    """A tail of NaN stays where it is: nobody reads it."""
    without_tail = mock.Mock(wraps=module._without_tail)
    monkeypatch.setattr(module, "_without_tail", without_tail)
    sizes = [alignment, 0, 3 * alignment]
    assert_like_each_group_alone(sizes, 1024, 128, 64, alignment=alignment)
    assert without_tail.called == is_copied


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("inner", "columns"), [(192, 256), (100, 64)])
def test_the_real_kernel_takes_the_call(monkeypatch, inner, columns, dtype):
    """Lowered for a GPU, not compiled: the kernel is JAX's, and experimental."""
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(core_count=132)])
    rows, _, group_sizes, dout = make_inputs([60, 4], 64, inner, columns, dtype)
    traced = jax.jit(module._transposed_ragged_dot).trace(rows, dout, group_sizes)
    assert traced.out_info.shape == (2, inner, columns)
    assert traced.out_info.dtype == dtype
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


class Device:
    def __init__(self, compute_capability=None):
        if compute_capability is not None:
            self.compute_capability = compute_capability


@pytest.mark.parametrize(
    ("device", "is_hopper"), [(Device("9.0"), True), (Device("10.0"), False), (Device(), False)]
)
def test_hopper_is_known_by_its_compute_capability(monkeypatch, device, is_hopper):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(module.backend, "get_default_device", lambda: device)
    cuda, default = module._backends()
    assert (cuda is module._HOPPER) == is_hopper
    assert default.matmul is jax.lax.ragged_dot
