"""Counts, losses and the bias against float64, alone and totalled over a mesh (E, point 10)."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routing_oracle as oracle
from helpers import assert_bitwise_equal, devices, make_floats
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from routing_oracle import make_mask

import jax_moe_ep as ep
from jax_moe_ep import balance, routing

SCORES, PER = get_args(routing.Score), get_args(balance.Per)

route = jax.jit(ep.route, static_argnames="config")


def test_expert_counts():
    """Ids outside [0, E) are no expert; int64 ids are compared before they are narrowed."""
    ids = np.random.default_rng(0).integers(-3, 12, (5, 7, 4)).astype(np.int32)
    counts = ep.expert_counts(ids, 9)
    assert counts.dtype == jnp.int32
    np.testing.assert_array_equal(counts, oracle.counts(ids, 9))
    with jax.enable_x64(True):
        wide = np.array([0, 2**32, 2**32 + 1, -(2**32), 1, 1], np.int64)
        assert ep.expert_counts(wide, 3).tolist() == [1, 2, 0]


def a_routing(*shape, E=6, K=2, score="sigmoid", mask=None):
    logits = 2 * make_floats(*shape, E, seed=7)
    return jax.device_get(route(logits, ep.RouterConfig(K, score=score), mask=mask))


def value_and_gradient(routing, **options):
    def loss(scores):
        return ep.load_balance_loss(dataclasses.replace(routing, scores=scores), **options)

    return jax.device_get(jax.jit(jax.value_and_grad(loss))(routing.scores))


def test_even_load_costs_one():
    """Every expert gets 2 of 8 assignments, so f = 1/4 for all, and P sums to 1: E * 1/4 = 1."""
    ids = np.array([[0, 1], [2, 3], [1, 2], [3, 0]], np.int32)
    for scores in (a_routing(4, E=4).scores, np.eye(4, dtype=np.float32)):
        even = ep.Routing(ids, np.ones((4, 2), np.float32), scores)
        assert abs(ep.load_balance_loss(even) - 1) < 1e-6
        assert abs(ep.load_balance_loss(even, per="sequence") - 1) < 1e-6
    one = ep.Routing(np.zeros((4, 1), np.int32), scores, np.eye(4, dtype=np.float32)[[0] * 4])
    assert ep.load_balance_loss(one) == 4


# The losses sum at most 2^8 terms of float32 here, relative to values that do not cancel.
LOSS_RTOL = 2.0**-16


@pytest.mark.parametrize("score", SCORES)
def test_load_balance_loss_of_a_batch(score):
    """Masked tokens (in route) and tokens left out here (mask) do not count, even if
    their scores are NaN, and have gradient 0."""
    mask, further = make_mask(5, 16, seed=1), make_mask(5, 16, seed=2)
    routing = a_routing(5, 16, score=score, mask=mask)
    counts = mask & further
    garbage = np.where(counts[..., None], routing.scores, np.nan)
    routing = dataclasses.replace(routing, scores=garbage)
    value, dscores = value_and_gradient(routing, mask=further)
    expected, gradient = oracle.balance(routing.topk_idx[counts], routing.scores[counts])
    np.testing.assert_allclose(value, expected, rtol=LOSS_RTOL)
    np.testing.assert_allclose(dscores[counts], gradient, rtol=0, atol=LOSS_RTOL)
    assert np.abs(gradient).max() > 100 * LOSS_RTOL
    assert not dscores[~counts].any()


def test_load_balance_loss_of_sequences():
    """The mean over the sequences that have tokens: the third has none, the fourth one."""
    mask = make_mask(4, 16)
    mask[2], mask[3] = False, np.arange(16) == 5
    routing = a_routing(4, 16, mask=mask)
    value, dscores = value_and_gradient(routing, per="sequence")
    losses = [
        oracle.balance(idx[m], scores[m])
        for idx, scores, m in zip(routing.topk_idx, routing.scores, mask, strict=True)
    ]
    np.testing.assert_allclose(value, sum(loss for loss, _ in losses) / 3, rtol=LOSS_RTOL)
    for actual, m, (_, gradient) in zip(dscores, mask, losses, strict=True):
        np.testing.assert_allclose(actual[m], gradient / 3, rtol=0, atol=LOSS_RTOL)
        assert not actual[~m].any()


@pytest.mark.parametrize("per", PER)
def test_losses_without_tokens_are_zero(per):
    """All masked, with NaN logits; and no tokens at all."""
    logits = np.full((2, 3, 4), np.nan, np.float32)

    def loss(logits, mask):
        routing = ep.route(logits, ep.RouterConfig(2), mask=mask)
        return ep.load_balance_loss(routing, per=per) + ep.z_loss(logits, mask=mask)

    for tokens in (logits, logits[:, :0], logits[:0]):
        value, gradient = jax.jit(jax.value_and_grad(loss))(
            tokens, np.zeros(tokens.shape[:-1], bool)
        )
        assert value == 0
        assert_bitwise_equal(gradient, np.zeros_like(tokens))


def test_load_balance_loss_of_scores_that_vanish():
    """Sigmoids of -60 sum to less than anything: a small share, finite gradients."""
    config = ep.RouterConfig(2, score="sigmoid")
    gradient_of = jax.jit(jax.grad(lambda x: ep.load_balance_loss(ep.route(x, config))))
    for logit in (-60, -90, -1000):
        gradient = gradient_of(np.full((4, 8), logit, np.float32))
        assert np.isfinite(gradient).all()


def test_z_loss():
    logits, mask = 3 * make_floats(9, 12, 6), make_mask(9, 12)
    logits[~mask] = np.nan
    value, dlogits = jax.jit(jax.value_and_grad(lambda x: ep.z_loss(x, mask=mask)))(logits)
    expected, gradient = oracle.squared_logsumexp(logits[mask])
    np.testing.assert_allclose(value, expected, rtol=LOSS_RTOL)
    np.testing.assert_allclose(dlogits[mask], gradient, rtol=0, atol=LOSS_RTOL)
    assert not dlogits[~mask].any()
    assert ep.z_loss(np.zeros((3, 4), np.float32)) == pytest.approx(np.log(4) ** 2)


def losses(logits, mask, batch_axes=(), sequence_axes=()):
    """The sum of all losses, with factors that tell them apart."""
    both = (*batch_axes, *sequence_axes)
    routing = ep.route(logits, ep.RouterConfig(2, score="sigmoid"), mask=mask)
    per_sequence = ep.load_balance_loss(
        routing, per="sequence", axis_name=batch_axes, sequence_axis_name=sequence_axes
    )
    per_batch = ep.load_balance_loss(routing, axis_name=both)
    return per_batch + 3 * per_sequence + 5 * ep.z_loss(logits, mask=mask, axis_name=both)


@pytest.mark.parametrize("check_vma", [True, False], ids=["vma", ""])
def test_statistics_are_totalled_over_the_axes(check_vma):
    """Sequences over 2 ranks, their tokens over 2 more: the losses and gradients of the whole.

    The ranks have different numbers of real tokens (A8), one sequence and one rank none.
    """
    mesh = Mesh(np.array(devices(4)).reshape(2, 2), ("data", "seq"))
    logits, mask = 2 * make_floats(4, 8, 6), make_mask(4, 8)
    mask[0] = False
    mask[2:, 4:] = False
    spec = P("data", "seq")
    sharded = jax.shard_map(
        lambda logits, mask: losses(logits, mask, ("data",), ("seq",)),
        mesh=mesh,
        in_specs=(spec, spec),
        out_specs=P(),
        check_vma=check_vma,
    )
    value, gradient = jax.jit(jax.value_and_grad(sharded))(logits, mask)
    expected, dexpected = jax.jit(jax.value_and_grad(losses))(logits, mask)
    np.testing.assert_allclose(value, expected, rtol=LOSS_RTOL)
    np.testing.assert_allclose(gradient, dexpected, rtol=0, atol=LOSS_RTOL)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_global_arrays_on_a_mesh(axis_type):
    """Sharded global arrays under jit: the same numbers, and the routing is sharded alike."""
    mesh = Mesh(np.array(devices(4)), ("data",), axis_types=(axis_type,))
    config = ep.RouterConfig(2, num_groups=2)
    logits, mask = make_floats(8, 4, 6), make_mask(8, 4)

    def run(logits, mask):
        gradient = jax.grad(
            lambda x: losses(x, mask) + (ep.route(x, config).topk_weights ** 2).sum()
        )
        routing = ep.route(logits, config, mask=mask)
        return routing, ep.expert_counts(routing.topk_idx, 6), gradient(logits)

    expected = jax.jit(run)(logits, mask)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P("data"))
        actual = jax.jit(run)(*jax.device_put((logits, mask), sharding))
    assert actual[0].topk_idx.sharding.is_equivalent_to(sharding, 3)
    np.testing.assert_array_equal(actual[0].topk_idx, expected[0].topk_idx)
    np.testing.assert_array_equal(actual[1], expected[1])
    np.testing.assert_allclose(actual[2], expected[2], rtol=0, atol=LOSS_RTOL)


def test_update_bias_by_hand():
    """Counts 5, 2, 2, 3: the mean is 3."""
    bias = np.array([1, 0, -1, 0.5], np.float32)
    updated = ep.update_bias(bias, np.array([5, 2, 2, 3], np.int32), rate=0.25)
    assert updated.tolist() == [0.75, 0.25, -0.75, 0.5]
    assert updated.dtype == jnp.float32


def test_update_bias_compares_exactly():
    """2^24 + 1 and 2^24 + 3 have the mean 2^24 + 2; means between integers push one and not two."""
    zeros = np.zeros(3, np.float32)
    counts = np.array([2**24 + 1, 2**24 + 2, 2**24 + 3], np.int32)
    assert ep.update_bias(zeros, counts, rate=1).tolist() == [1, 0, -1]
    assert ep.update_bias(zeros, np.array([1, 2, 2], np.int32), rate=1).tolist() == [1, -1, -1]


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint32, np.int32])
def test_update_bias_by_counts_of_any_integers(dtype):
    """The mean is 4."""
    updated = ep.update_bias(np.zeros(4, np.float32), np.array([0, 10, 4, 2], dtype), rate=1.0)
    assert updated.tolist() == [1, -1, 0, 1]


def test_losses_under_strict_promotion():
    """Without further tokens the same, with types that JAX converts by name only."""
    logits = make_floats(6, 8)
    routing = ep.route(logits, ep.RouterConfig(2))
    losses = ep.load_balance_loss(routing), ep.z_loss(logits)
    with jax.numpy_dtype_promotion("strict"):
        assert (ep.load_balance_loss(routing), ep.z_loss(logits)) == losses


def test_update_bias_balances():
    """Experts of skewed logits: the fullest gets over 3 times the mean, in the end 1.2 times."""
    logits = 0.5 * make_floats(2048, 8) + np.linspace(0, 3, 8, dtype=np.float32)
    config = ep.RouterConfig(2, score="sigmoid")

    @jax.jit
    def step(bias, rate):
        counts = ep.expert_counts(ep.route(logits, config, bias=bias).topk_idx, 8)
        return ep.update_bias(bias, counts, rate=rate), counts.max() / counts.mean()

    bias, before = step(np.zeros(8, np.float32), 0.003)
    for _ in range(300):
        bias, after = step(bias, 0.003)
    assert before > 3
    assert after < 1.2
