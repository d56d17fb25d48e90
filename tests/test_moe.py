"""moe_mlp on global arrays, against experts applied to every token and masked."""

import dataclasses
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import AXIS, Case, devices, make_floats, make_ids
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_moe_ep as ep
from jax_moe_ep import moe

CASE = Case(T=8, K=2, E=4, R=2, A=16, H=8)
F = 6
# Two matmuls over H = 8 and F = 6 terms and a sum over K = 2, all in float32, whose rounding is
# 2^-24 a term: some 2^5 of them, and values of about 10.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def mesh_of(shape=(2,), names=(AXIS,), axis_type=AxisType.Auto):
    found = np.array(devices(int(np.prod(shape)))).reshape(shape)
    return Mesh(found, names, axis_types=(axis_type,) * len(names))


def make_inputs(case=CASE, maker="masked", lead=None, F=F):
    """x, ids, weights of R*T tokens, and the experts; `lead` is the shape of the tokens."""
    num_tokens = case.R * case.T
    lead = (num_tokens,) if lead is None else lead
    ids = make_ids(maker, case).reshape(*lead, case.K)
    x = make_floats(*lead, case.H)
    weights = make_floats(*lead, case.K, seed=1)
    w_gate_up = make_floats(case.E, case.H, 2 * F, seed=2)
    w_down = make_floats(case.E, F, case.H, seed=3)
    return x, ids, weights, w_gate_up, w_down


def dense(x, ids, weights, w_gate_up, w_down, is_kept=True, gate=jax.nn.silu):
    """Every expert on every token; `is_kept` [..., K] masks the assignments."""
    gated, up = jnp.split(jnp.einsum("...h,ehf->...ef", x, w_gate_up), 2, -1)
    y = jnp.einsum("...ef,efh->...eh", gate(gated) * up, w_down)
    is_chosen = ids[..., None] == jnp.arange(w_gate_up.shape[0])
    is_chosen &= jnp.asarray(is_kept)[..., None]
    factor = jnp.sum(jnp.where(is_chosen, weights[..., None], 0), -2)
    return jnp.einsum("...e,...eh->...h", factor, y)


def assert_all_close(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, **TOLERANCE)


def assert_like_dense(case, mesh, inputs, is_kept=True, sharding=None, **options):
    """Results and gradients of moe_mlp are those of the dense layer; its result and Stats."""
    x, ids, *rest = inputs
    gate = {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu}[options.get("activation", "swiglu")]
    dout = make_floats(*x.shape, seed=4)

    def sparse(x, ids, *rest):
        return ep.moe_mlp(x, ids, *rest, mesh=mesh, config=case.config("auto"), **options)

    def results(layer, x, ids, *rest):
        run = jax.jit(lambda x, *rest: layer(x, ids, *rest))
        (out, stats), pull = jax.vjp(run, x, *rest)
        cotangent = jax.device_put(dout, out.sharding)
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), stats)
        return out, pull((cotangent, zeros)), stats

    def place(*arrays):
        return arrays if sharding is None else jax.device_put(arrays, sharding)

    with jax.default_matmul_precision("highest"):
        placed = place(x, ids, rest[0])
        out, gradients, stats = results(sparse, *placed, *rest[1:])
        expected_out, expected, _ = results(
            lambda *args: (dense(*args, is_kept=is_kept, gate=gate), None), x, ids, *rest
        )
    assert_all_close(out, expected_out)
    assert_all_close(gradients, expected)
    return out, stats


@pytest.mark.parametrize(("A", "activation"), [(1, "swiglu"), (16, "geglu"), (128, "swiglu")])
def test_forward_and_gradients(A, activation):
    """A8: tokens of uneven numbers on the ranks, ids that are no experts; any alignment."""
    case = dataclasses.replace(CASE, A=A)
    inputs = make_inputs(case)
    _, stats = assert_like_dense(case, mesh_of(), inputs, activation=activation)
    counts = oracle.plan(case, inputs[1].reshape(2, 8, 2))["group_counts"]
    assert stats.expert_counts.tolist() == counts.reshape(-1).tolist()
    assert stats.num_dropped == 0


def test_an_undefined_tail_leaks_nowhere():
    """The reference's tail is NaN there: neither results nor any gradient may be."""
    case = dataclasses.replace(CASE, tail="undefined")
    assert_like_dense(case, mesh_of(), make_inputs(case, "one_expert"))


def test_drops_by_priority():
    """The weights are the priority: each expert keeps its two dearest assignments."""
    case = dataclasses.replace(CASE, expert_capacity=2, drop_policy="priority")
    inputs = make_inputs(case, "uniform")
    shape = (case.R, case.T, case.K)
    owners = oracle.plan(case, inputs[1].reshape(shape), inputs[2].reshape(shape))["owners"]
    is_kept = owners.reshape(-1, case.K) >= 0
    _, stats = assert_like_dense(case, mesh_of(), inputs, is_kept)
    assert stats.num_dropped == (~is_kept).sum() > 0
    assert stats.expert_counts.tolist() == [2] * case.E


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_beside_data_and_tensor_axes(axis_type):
    """Tokens sharded over data and expert; the tensor axis computes the same.

    An explicit mesh never moves data by itself: the experts come unsharded and are resharded.
    """
    mesh = mesh_of((2, 2, 2), ("data", AXIS, "tensor"), axis_type)
    case = dataclasses.replace(CASE, T=4, R=4)
    sharding = NamedSharding(mesh, P(("data", AXIS)))
    inputs = make_inputs(case, "uniform")
    axes = ("data", AXIS)
    out, stats = assert_like_dense(case, mesh, inputs, sharding=sharding, token_axes=axes)
    assert out.sharding.is_equivalent_to(sharding, out.ndim)
    assert stats.num_assignments == 4 * 4 * 2  # every token once, not once a tensor shard


def test_sequences_sharded_over_all_axes():
    """[N, S, H] and no token_axes: N over every axis, a shard's tokens taken together."""
    mesh = mesh_of((2, 2), ("data", AXIS))
    case = dataclasses.replace(CASE, T=4, R=4)
    out, stats = assert_like_dense(case, mesh, make_inputs(case, "uniform", lead=(4, 4)))
    assert out.shape == (4, 4, CASE.H)
    assert stats.num_assignments == 4 * 4 * 2


# Errors.


def raises(text, error=ValueError):
    return pytest.raises(error, match=re.escape(text))


def call(inputs=None, mesh=None, config=None, **options):
    mesh = mesh_of() if mesh is None else mesh
    config = CASE.config("auto") if config is None else config
    return ep.moe_mlp(*(inputs or make_inputs()), mesh=mesh, config=config, **options)


def test_errors_of_options():
    with raises("jax_moe_ep.moe_mlp: activation must be one of 'swiglu', 'geglu', got 'relu'"):
        call(activation="relu")
    with raises("jax_moe_ep.moe_mlp: axis 'other' is not in the mesh, which has ('expert',)"):
        call(token_axes=("other", AXIS))
    with raises("token_axes=('data',) must contain the EP axes; ['expert'] are missing"):
        call(mesh=mesh_of((2, 2), ("data", AXIS)), token_axes=("data",))
    with raises("axis 'group' is not in the mesh"):
        call(config=CASE.config(axis_name="group"))
    with raises("axis 'group' is not in the mesh"):
        call(token_axes="group")
    with raises("jax_moe_ep.moe_mlp: token_axes must be a mesh axis name or a tuple", TypeError):
        call(token_axes=3)
    with raises("num_experts=5 is not a multiple of the 2 ranks of axis 'expert'"):
        call(config=dataclasses.replace(CASE, E=5).config())
    with raises("jax_moe_ep.moe_mlp: config must be an EpConfig, got 3", TypeError):
        call(config=3)
    with raises("jax_moe_ep.moe_mlp: mesh must be a jax.sharding.Mesh, got 3", TypeError):
        call(mesh=3)
    with raises("activation must be one of 'swiglu', 'geglu', got ['swiglu']"):
        call(activation=["swiglu"])


def test_one_token_axis_is_named_alone():
    out, _ = call(token_axes=AXIS)
    np.testing.assert_array_equal(out, call()[0])


def test_errors_of_shapes():
    x, ids, weights, w_gate_up, w_down = make_inputs()
    with raises("topk_idx [..., K] and topk_weights [..., K] must agree, got (16, 8), (15, 2)"):
        call((x, ids[1:], weights, w_gate_up, w_down))
    with raises("must agree, got (16, 8), (16, 2) and (16, 1)"):
        call((x, ids, weights[:, :1], w_gate_up, w_down))
    message = "with E = 4 and H = 8, w_gate_up must be [E, H, 2F] with F >= 1, got"
    for wrong in (w_gate_up[..., 1:], w_gate_up[1:], w_gate_up[0], w_gate_up[..., :0]):
        with raises(f"{message} {wrong.shape}"):
            call((x, ids, weights, wrong, w_down))
    with raises("w_down must be [E, F, H] = (4, 6, 8), got (4, 6, 7)"):
        call((x, ids, weights, w_gate_up, w_down[..., 1:]))
    message = "x must be [..., H] and topk_idx [..., K] with H and K >= 1, got"
    with raises(f"{message} (16, 0) and (16, 2)"):
        call((x[:, :0], ids, weights, w_gate_up, w_down))
    with raises(f"{message} (16, 8) and (16, 0)"):
        call((x, ids[:, :0], weights[:, :0], w_gate_up, w_down))
    with raises("the first dimension of x, 15, must be a multiple of the 2 shards of axes"):
        call((x[1:], ids[1:], weights[1:], w_gate_up, w_down))


def test_errors_of_dtypes():
    x, *rest = make_inputs()
    message = "x, w_gate_up and w_down must have one dtype, got bfloat16, float32 and float32"
    with raises(f"jax_moe_ep.moe_mlp: {message}", TypeError):
        call((x.astype(jnp.bfloat16), *rest))
    x, ids, *rest = make_inputs()
    message = "jax_moe_ep.moe_mlp: topk_idx must be int32 or int64, got"
    for dtype in (np.float32, np.bool_):
        with raises(f"{message} {np.dtype(dtype)}. dense_to_topk makes ids", TypeError):
            call((x, ids.astype(dtype), *rest))


def assert_like_dense_in_bf16(case, F, implementation="auto"):
    """Results and gradients keep the dtype.

    Some 2^4 roundings of 2^-9 each, relative to the largest values.
    """
    x, ids, weights, *experts = make_inputs(case, F=F)
    dout = make_floats(*x.shape, seed=4)
    narrow = [each.astype(jnp.bfloat16) for each in (x, *experts)]
    wide = [each.astype(np.float32) for each in narrow]

    def sparse(x, *experts):
        return call((x, ids, weights, *experts), config=case.config(implementation))[0]

    def results(layer, inputs):
        out, pull = jax.vjp(jax.jit(layer), *inputs)
        return out, *pull(jax.device_put(dout.astype(out.dtype), out.sharding))

    actual = results(sparse, narrow)
    with jax.default_matmul_precision("highest"):
        expected = results(lambda x, *experts: dense(x, ids, weights, *experts), wide)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        limit = 2.0**-5 * np.abs(e).max(initial=0)
        np.testing.assert_allclose(a.astype(np.float32), e, rtol=0, atol=limit)


@pytest.mark.parametrize(
    ("T", "A", "H", "F"),
    [(8, 16, 8, 6), (9, 1, 8, 100), (32, 64, 64, 64), (2048, 128, 128, 192)],
)
def test_bf16_tokens_and_experts(T, A, H, F):
    """C is 32, 36 or 128: rows and experts are whole tiles of the kernels or not. With T = 2048 a
    group is several tiles long."""
    assert_like_dense_in_bf16(dataclasses.replace(CASE, T=T, A=A, H=H), F)


@pytest.mark.parametrize("A", [1, 64])
def test_an_undefined_tail_leaks_nowhere_in_bf16(monkeypatch, A):
    """The reference's tail, on all platforms: it is NaN. The experts know how groups are aligned,
    and so whether they must drop it."""
    matmul = mock.Mock(wraps=moe.grouped_matmul)
    monkeypatch.setattr(moe, "grouped_matmul", matmul)
    case = dataclasses.replace(CASE, A=A, tail="undefined")
    assert_like_dense_in_bf16(case, F, "reference")
    assert {call.kwargs["alignment"] for call in matmul.call_args_list} == {A}
