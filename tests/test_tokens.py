"""Sequence parallelism: parts of a replicated sequence, pads that touch nothing, masked routing.

Requirements D1, D2, D4 to D6 and D8; test_sequence_parallel.py has them around a whole layer.
Expected values are NumPy's, in float32: the functions of a row here have products only, rounded
one by one, so that everything is bitwise.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from errors import raises
from helpers import (
    AXIS,
    Case,
    assert_bitwise_equal,
    assert_close,
    devices,
    make_bits,
    make_floats,
    make_ids,
)
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_moe_ep as ep

SIZES = range(1, 18)
BATCHES = (1, 2, 3)
H, K, E = 4, 2, 8
each_vma = pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])


def mesh_of(*shape):
    names = {1: (AXIS,), 2: ("a", "b")}[len(shape)]
    return Mesh(np.array(devices(math.prod(shape))).reshape(shape), names)


def padded(x, num_ranks, dim=0):
    """x with zeros up to a multiple of num_ranks: the parts of all ranks, one after the other."""
    widths = [(0, -x.shape[i] % num_ranks if i == dim else 0) for i in range(x.ndim)]
    return np.pad(x, widths)


def on_axis(op, num_ranks, out_specs):
    """op on arguments that all ranks hold, jitted."""
    run = jax.shard_map(op, mesh=mesh_of(num_ranks), in_specs=P(), out_specs=out_specs)
    return jax.jit(run)


# Split and merge.


def thirds(x, is_real):
    """3x where x is positive and 1.5x elsewhere; NaN, with NaN gradients, in the pads."""
    factor = jnp.where(is_real, 3, jnp.nan).reshape(-1, 1).astype(x.dtype)
    return x * jnp.where(x > 0, 1, 0.5) * factor


def round_trip(x, dout):
    """On [B, T, H]: the part, its mask, the result, and the gradients of the part and of x."""
    size = x.shape[1]

    def merge(local):
        return ep.merge_tokens(local, AXIS, size=size, dim=1)

    def layer(x):
        part, is_real = ep.split_tokens(x, AXIS, dim=1)
        return merge(thirds(part, is_real))

    part, is_real = ep.split_tokens(x, AXIS, dim=1)
    out, pull = jax.vjp(layer, x)
    return (part, is_real, jax.vjp(merge, part)[1](dout)[0]), (out, *pull(dout))


ROUND_TRIP_SPECS = ((P(None, AXIS), P(AXIS), P(None, AXIS)), (P(), P()))


def assert_round_trip(results, x, dout, num_ranks):
    (parts, is_real, dparts), (out, dx) = results
    assert_bitwise_equal(parts, padded(x, num_ranks, dim=1), "parts")
    assert_bitwise_equal(is_real, padded(np.ones(x.shape[1], bool), num_ranks), "is_real")
    assert_bitwise_equal(dparts, padded(dout, num_ranks, dim=1), "gradient of the parts")
    slope = np.where(x > 0, np.float32(1), np.float32(0.5))
    assert_bitwise_equal(out, x * slope * np.float32(3), "out")
    assert_bitwise_equal(dx, dout * np.float32(3) * slope, "gradient")


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_every_length_and_batch(num_ranks):
    """D1, D4, D5, D6: T from 1 to 17, B from 1 to 3, also fewer tokens than ranks.

    The pads become NaN between split and merge, forward and backward, and leave no trace. Zeros of
    both signs keep theirs in the gradient, which is a gather and not a sum.
    """
    x = [make_floats(B, T, H, seed=T) for T in SIZES for B in BATCHES]
    dout = [make_floats(*each.shape, seed=1) for each in x]
    for each in dout:
        each[..., 0], each[..., 1] = -0.0, 0.0
    run = on_axis(
        lambda x, dout: [round_trip(*pair) for pair in zip(x, dout, strict=True)],
        num_ranks,
        [ROUND_TRIP_SPECS] * len(x),
    )
    for results, *pair in zip(run(x, dout), x, dout, strict=True):
        assert_round_trip(results, *pair, num_ranks)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_no_tokens(num_ranks):
    """T = 0, no batch and no columns: nothing is gathered, which XLA would refuse."""
    for shape in ((1, 0, H), (2, 0, H), (3, 0, H), (0, 3, H), (2, 3, 0)):
        # Arguments without elements can crash XLA's compiler on CPUs: these are made inside.
        def run(shape=shape):
            return round_trip(jnp.zeros(shape), jnp.zeros(shape))

        x = np.zeros(shape, np.float32)
        assert_round_trip(on_axis(run, num_ranks, ROUND_TRIP_SPECS)(), x, x, num_ranks)


@each_vma
@pytest.mark.parametrize("num_ranks", [4, 8])
def test_gradient_outside_of_shard_map(num_ranks, check_vma):
    """D1: x [T, H] and scales of every rank, x and what all ranks share, with a residual.

    out = x + s[r] * v * x on the rank r of the token: dx = dout + s*v*dout, ds = v * sum of x*dout
    over the rank's tokens, dv = the sum over ranks of s times that. A merge that took an n-th of
    the gradient, or n times it, would be wrong in ds.
    """
    scales = 1 + np.arange(num_ranks, dtype=np.float32)
    v = np.float32(3)

    def layer(x, scales, v):
        part, _ = ep.split_tokens(x, AXIS)
        return x + ep.merge_tokens(part * scales * v, AXIS, size=x.shape[0])

    in_specs = (P(), P(AXIS), P())
    run = jax.shard_map(
        layer, mesh=mesh_of(num_ranks), in_specs=in_specs, out_specs=P(), check_vma=check_vma
    )

    def pull(x, dout):
        out, pull = jax.vjp(run, x, scales, v)
        return out, pull(dout)

    for T in (1, 11, 16):
        x, dout = make_floats(T, H), make_floats(T, H, seed=1)
        out, (dx, dscales, dv) = jax.jit(pull)(x, dout)
        rank = np.arange(T) // -(-T // num_ranks)
        factor = 1 + scales[rank, None].astype(np.float64) * v
        dots = np.bincount(rank, (x.astype(np.float64) * dout).sum(1), num_ranks)
        assert_close(out, factor * x)
        assert_close(dx, factor * dout)
        assert_close(dscales, v * dots)
        assert_close(dv, scales @ dots)


def test_gradient_without_check_vma_is_bitwise_too():
    """D1: the sum over n = 2^i ranks of an n-th each, and over zeros, is exact."""

    def layer(x):
        return ep.merge_tokens(thirds(*ep.split_tokens(x, AXIS)), AXIS, size=x.shape[0])

    run = jax.shard_map(layer, mesh=mesh_of(4), in_specs=P(), out_specs=P(), check_vma=False)
    x, dout = make_floats(11, H), make_floats(11, H, seed=1)
    (dx,) = jax.jit(lambda x: jax.vjp(run, x)[1](dout))(x)
    assert_bitwise_equal(dx, dout * np.float32(3) * np.where(x > 0, np.float32(1), np.float32(0.5)))


def test_a_tree_of_every_dtype():
    """Data only moves, whatever its bits and its shape behind the tokens; pads are zero bits."""
    dtypes = (np.float32, np.float16, jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e8m0fnu)
    dtypes += (np.int8, np.int32, np.uint32, bool)
    x = {np.dtype(t).name: make_bits(7, *[3] * (i % 3), dtype=t) for i, t in enumerate(dtypes)}

    def both(x):
        part, _ = ep.split_tokens(x, AXIS)
        return part, ep.merge_tokens(part, AXIS, size=7)

    parts, whole = on_axis(both, 4, (P(AXIS), P()))(x)
    for name, leaf in x.items():
        zeros = np.zeros((1, leaf[0].nbytes), np.uint8).view(leaf.dtype).reshape(1, *leaf.shape[1:])
        assert_bitwise_equal(parts[name], np.concatenate([leaf, zeros]), name)
        assert_bitwise_equal(whole[name], leaf, name)


@pytest.mark.parametrize("shape", [(2, 4), (4, 2)])
def test_one_axis_or_several(shape):
    """D4: ranks count in row-major order of the tuple, whichever axis of the mesh comes first."""
    x = make_floats(2, 13, H)
    axes = ("a", "b", ("a", "b"), ("b", "a"))

    def every(x):
        parts = [ep.split_tokens(x, axis, dim=1)[0] for axis in axes]
        pairs = zip(parts, axes, strict=True)
        return parts, [ep.merge_tokens(part, axis, size=13, dim=1) for part, axis in pairs]

    specs = ([P(None, axis) for axis in axes], P())
    run = jax.shard_map(every, mesh=mesh_of(*shape), in_specs=P(), out_specs=specs)
    parts, whole = jax.jit(run)(x)
    for axis, part, merged in zip(axes, parts, whole, strict=True):
        num_ranks = math.prod(shape[("a", "b").index(name)] for name in axis)
        assert_bitwise_equal(part, padded(x, num_ranks, dim=1), f"parts over {axis}")
        assert_bitwise_equal(merged, x, f"merged over {axis}")


@each_vma
def test_operations_of_the_divisible_case(check_vma):
    """D8: one dynamic_slice, the rank's part, and one all_gather, forward and, mirrored, backward.

    17 tokens need a pad and a slice each way. Without check_vma the backward is JAX's own: a
    reduce_scatter, and a sum of parts in a sea of zeros.
    """

    def layer(x):
        part, _ = ep.split_tokens(x, AXIS, dim=1)
        return ep.merge_tokens(part, AXIS, size=x.shape[1], dim=1)

    run = jax.shard_map(layer, mesh=mesh_of(4), in_specs=P(), out_specs=P(), check_vma=check_vma)

    def counts(f, size):
        text = jax.jit(f).lower(np.zeros((2, size, H), np.float32)).as_text()
        found = re.findall(r"stablehlo\.(\w+)", text)
        ops = ("pad", "slice", "concatenate", "dynamic_slice", "all_gather", "transpose", "reshape")
        ops += ("all_reduce", "gather", "scatter", "select")
        return {op: found.count(op) for op in ops if found.count(op)}

    def backward(x):
        return jax.vjp(run, x)[1](x)

    assert counts(run, 16) == {"dynamic_slice": 1, "all_gather": 1}
    ragged = {"pad": 1, "slice": 1, "dynamic_slice": 1, "all_gather": 1}
    assert counts(run, 17) == ragged
    if check_vma:
        assert counts(backward, 16) == {"dynamic_slice": 1, "all_gather": 1}
        assert counts(backward, 17) == ragged


# Masked routing.


@pytest.mark.parametrize("pad", ["none", "expert0"])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_masked_tokens_have_no_expert(pad, dtype):
    """D2, D6: ids -1, or 0 for "expert0"; weights and their gradient exactly 0 where NaN was."""
    ids = make_ids("uniform", Case(T=5, K=K, E=E, R=3))
    is_real = np.array([True, False, True, True, False])
    weights = np.where(is_real[:, None], make_floats(3, 5, K), np.nan).astype(dtype)
    dout = np.where(is_real[:, None], make_floats(3, 5, K, seed=1), np.nan).astype(dtype)
    for mask in (is_real, np.broadcast_to(is_real, (3, 5))):
        out, pull = jax.vjp(lambda w, mask=mask: ep.mask_routing(ids, w, mask, pad=pad)[1], weights)
        masked, _ = ep.mask_routing(ids, weights, mask, pad=pad)
        nobody = {"none": -1, "expert0": 0}[pad]
        assert_bitwise_equal(masked, np.where(is_real[:, None], ids, np.int32(nobody)))
        assert_bitwise_equal(out, np.where(is_real[:, None], weights, np.array(0, dtype)))
        assert_bitwise_equal(pull(dout)[0], np.where(is_real[:, None], dout, np.array(0, dtype)))


# Errors and examples.


def test_errors_of_split_tokens():
    x = np.zeros((3, 5))
    name = "jax_moe_ep.split_tokens:"

    def split(x, axis_name=AXIS, **options):
        return on_axis(lambda x: ep.split_tokens(x, axis_name, **options)[1], 2, P(AXIS))(x)

    message = "T = 5 tokens (dimension 1 of x) are not a multiple of the 2 ranks of axis 'expert'"
    with raises(ValueError, name, message, "ragged='pad'"):
        split(x, dim=1, ragged="error")
    assert split(np.zeros((3, 4)), dim=1, ragged="error").tolist() == [True] * 4
    with raises(ValueError, name, "ragged must be one of 'pad', 'error', got 'drop'"):
        split(x, ragged="drop")
    message = "x must hold arrays with the same number of tokens in dimension"
    for tree, dim in (((x, x.T), 0), ((x, x[0]), 1), ((), 0), (x, 2), (x, -1)):
        with raises(ValueError, name, message, f"{dim}, got shapes", "Say with dim"):
            split(tree, dim=dim)
    for axis_name in ((), (AXIS, AXIS), 3, [3]):
        with raises(TypeError, name, "axis_name must be a mesh axis name or a tuple of", "got"):
            split(x, axis_name)
    with raises(ValueError, name, "axis 'other' is not bound here", "jax.shard_map"):
        split(x, "other")
    with raises(ValueError, name, "axis 'expert' is not bound here", "jax.shard_map"):
        ep.split_tokens(x, AXIS)


def test_tokens_that_differ_along_the_axis_are_refused():
    """With check_vma JAX knows: rank r would take part r of its own array, and lose the others."""
    run = jax.shard_map(
        lambda x: ep.split_tokens(x, AXIS)[0], mesh=mesh_of(2), in_specs=P(AXIS), out_specs=P(AXIS)
    )
    message = "jax_moe_ep.split_tokens: x must be the same on all ranks of axes ('expert',), but"
    with raises(ValueError, message, "varies along ['expert']", "merge_tokens"):
        run(np.zeros((4, 3)))


def test_errors_of_merge_tokens():
    name = "jax_moe_ep.merge_tokens:"

    def merge(size, axis_name=AXIS, **options):
        return on_axis(lambda x: ep.merge_tokens(x, axis_name, size=size, **options), 2, P())(
            np.zeros((3, 4))
        )

    message = "size = 7 tokens over the 2 ranks of axis 'expert' are 4 a rank, but local has 3 in"
    with raises(ValueError, name, message, "Give the T"):
        merge(7)
    assert merge(7, dim=1).shape == (3, 7)
    for size in (-1, 5.0, True):
        with raises(ValueError, name, f"size must be T, an int of at least 0, got {size}"):
            merge(size)
    with raises(ValueError, name, "local must hold arrays with the same number of tokens"):
        merge(7, dim=2)
    with raises(TypeError, name, "axis_name must be a mesh axis name"):
        merge(7, ())
    with raises(ValueError, name, "axis 'other' is not bound here"):
        merge(7, "other")


def test_errors_of_mask_routing():
    ids, weights, is_real = np.zeros((2, 3, K), np.int32), np.zeros((2, 3, K)), np.ones(3, bool)
    name = "jax_moe_ep.mask_routing:"
    with raises(ValueError, name, "pad must be one of 'none', 'expert0', got 'expert1'"):
        ep.mask_routing(ids, weights, is_real, pad="expert1")
    with raises(TypeError, name, "topk_idx must be int32 or int64, got uint8"):
        ep.mask_routing(ids.astype(np.uint8), weights, is_real)
    with raises(TypeError, name, "topk_weights must be floating, got int32"):
        ep.mask_routing(ids, ids, is_real)
    with raises(TypeError, name, "is_real must be bool, got int32"):
        ep.mask_routing(ids, weights, np.ones(3, np.int32))
    with raises(ValueError, name, "must both be [..., K], got shapes (2, 3, 2) and (3, 2)"):
        ep.mask_routing(ids, weights[0], is_real)
    for mask in (np.ones((), bool), np.ones(2, bool), np.ones((1, 2, 3), bool)):
        message = (
            f"is_real must have the shape of the tokens, (2, 3), or the end of it, got {mask.shape}"
        )
        with raises(ValueError, name, message, "Mask a batch"):
            ep.mask_routing(ids, weights, mask)
