"""Routing maps: ids to a dense map and back, their gradients and their memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    MAKERS,
    Case,
    assert_bitwise_equal,
    make_floats,
    make_ids,
    make_mesh,
)
from maps_oracle import gathered, make_map, rising, scattered, true_experts

import jax_moe_ep as ep

SHAPES = {
    "few_experts": Case(T=13, K=3, E=4, R=1),
    "many_experts": Case(T=9, K=8, E=70, R=1),
    "k_beyond_e": Case(T=5, K=6, E=3, R=1),
    "one_expert": Case(T=4, K=1, E=1, R=1),
    "no_tokens": Case(T=0, K=2, E=8, R=1),
}
each_shape = pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)


def make_weights(case, ids, dtype=np.float32):
    """Random weights; NaN where there is no expert."""
    weights = make_floats(*ids.shape, dtype=dtype)
    weights[(ids < 0) | (ids >= case.E)] = np.nan
    return weights


def pull(f, x, dout):
    """The gradient of x, compiled."""
    return jax.jit(lambda x, dout: jax.vjp(f, x)[1](dout)[0])(x, dout)


# topk_to_dense.


@each_shape
def test_map_and_probs_are_those_of_a_scatter(case):
    """A1, A2: ids outside [0, E) contribute nothing, though their weights are NaN; duplicates sum.

    C2: one program for all routings.
    """
    run = jax.jit(lambda ids, weights: ep.topk_to_dense(ids, weights, case.E))
    for maker in MAKERS:
        ids = make_ids(maker, case)[0]
        weights = make_weights(case, ids)
        expected_map, expected_probs = scattered(case, ids, weights)
        routing_map, probs = run(ids, weights)
        assert_bitwise_equal(routing_map, expected_map, f"map of {maker}")
        assert_bitwise_equal(probs, expected_probs, f"probs of {maker}")
    assert run._cache_size() == 1


def test_duplicates_are_summed_in_the_order_of_k_by_hand():
    """A2: 1e8 + 1 - 1e8 is 0 in this order: float32 has steps of 8 at 1e8. The map is one bit."""
    routing_map, probs = ep.topk_to_dense(
        np.array([[2, 2, 0, 2, -1]]), np.array([[1e8, 1, 3, -1e8, np.nan]], np.float32), 4
    )
    assert routing_map.tolist() == [[True, False, True, False]]
    assert probs.tolist() == [[3, 0, 0, 0]]


def test_int64_ids_are_compared_before_they_are_narrowed():
    """A1: 2^32 + 1 and -2^32 + 1 are no experts, though their low 32 bits are those of expert 1."""
    ids = np.array([[2**32 + 1, 3], [-(2**32) + 1, 1], [2**63 - 1, -(2**63)]])
    case, weights = Case(T=3, K=2, E=4, R=1), make_floats(3, 2)
    with jax.enable_x64(True):
        routing_map, probs = ep.topk_to_dense(jnp.asarray(ids), weights, 4)
        dweights = pull(lambda w: ep.topk_to_dense(ids, w, 4)[1], weights, probs)
    expected_map, expected_probs = scattered(case, ids, weights)
    assert_bitwise_equal(routing_map, expected_map)
    assert_bitwise_equal(probs, expected_probs)
    assert_bitwise_equal(dweights, gathered(ids, expected_probs))


def test_without_weights_there_are_no_probs():
    routing_map, probs = ep.topk_to_dense(np.array([[1, -1]]), None, 2)
    assert (routing_map.tolist(), probs) == ([[False, True]], None)
    topk_idx, topk_weights = ep.dense_to_topk(routing_map, None, 1)
    assert (topk_idx.tolist(), topk_weights) == ([[1]], None)


@each_shape
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_gradient_of_probs_gathers_back(case, dtype):
    """A3: every duplicate gets its expert's gradient and -1 exactly 0, whatever the NaN around."""
    run = jax.jit(
        lambda ids, weights, dout: jax.vjp(
            lambda weights: ep.topk_to_dense(ids, weights, case.E)[1], weights
        )[1](dout)[0]
    )
    for maker in MAKERS:
        ids = make_ids(maker, case)[0]
        weights = make_weights(case, ids, dtype)
        dout = make_floats(case.T, case.E, seed=1)
        dout[~scattered(case, ids, weights)[0]] = np.nan
        dweights = run(ids, weights, dout)
        assert_bitwise_equal(dweights, gathered(ids, dout).astype(dtype), maker)


def test_gradient_with_nan_stays_at_its_expert():
    """A3: NaN in the gradient of expert 0 reaches the place that names 0, and no other."""
    ids = np.array([[0, 1, -1, 5, 1]])
    dout = np.array([[np.nan, 7, 5]], np.float32)
    weights = np.zeros((1, 5), np.float32)
    dweights = pull(lambda w: ep.topk_to_dense(ids, w, 3)[1], weights, dout)
    assert_bitwise_equal(dweights, np.array([[np.nan, 7, 0, 0, 7]], np.float32))


def test_gradients_of_gradients():
    """With f = sum(probs^3), probs = 2w at a place with a twin of equal weight: f' = 3 (2w)^2 for
    each twin, and the gradient of their sum, 6 (2w)^2, is 48w for both together, 24w each."""
    ids, weights = np.array([[1, 1]]), np.full((1, 2), 5.0, np.float32)

    def f(w):
        return (ep.topk_to_dense(ids, w, 2)[1] ** 3).sum()

    assert jax.grad(f)(weights).tolist() == [[300, 300]]
    assert jax.grad(lambda w: jax.grad(f)(w).sum())(weights).tolist() == [[120, 120]]


def test_map_in_shard_map_with_replicated_weights():
    """Each rank names other experts with the same weights; their gradients are summed."""
    case = Case(T=3, K=2, E=4, R=2)
    ids, weights = make_ids("random", case), make_floats(case.T, case.K)
    dout = make_floats(case.R, case.T, case.E, seed=1)

    def gradient(ids, weights, dout):
        return jax.vjp(lambda w: ep.topk_to_dense(ids[0], w, case.E)[1], weights)[1](dout[0])[0]

    specs = (jax.P("expert"), jax.P(), jax.P("expert"))
    run = jax.shard_map(gradient, mesh=make_mesh(2), in_specs=specs, out_specs=jax.P())
    expected = gathered(ids[0], dout[0]) + gathered(ids[1], dout[1])
    assert_bitwise_equal(jax.jit(run)(ids, weights, dout), expected)


# Memory.


def compiled_bytes(f, *args):
    """Bytes of temporaries of the compiled program, and its text before compilation."""
    lowered = jax.jit(f).lower(*args)
    return lowered.compile().memory_analysis().temp_size_in_bytes, lowered.as_text()


@pytest.mark.parametrize("num_experts", [64, 256])
def test_nothing_as_large_as_tokens_times_k_times_experts(num_experts):
    """A4: temporaries of at most 2*T*E bytes; no array is [T, K, E], not even in a fusion."""
    T, K, E = 2048, 8, num_experts
    ids, weights = jnp.zeros((T, K), jnp.int32), jnp.zeros((T, K))
    routing_map, probs = jnp.zeros((T, E), bool), jnp.zeros((T, E))
    programs = {
        "forward": (lambda ids, w: ep.topk_to_dense(ids, w, E), ids, weights),
        "gradient": (
            lambda ids, w, dout: jax.vjp(lambda w: ep.topk_to_dense(ids, w, E)[1], w)[1](dout),
            ids,
            weights,
            probs,
        ),
        "inverse": (lambda m, p: ep.dense_to_topk(m, p, K), routing_map, probs),
    }
    for name, (f, *args) in programs.items():
        temporary, text = compiled_bytes(f, *args)
        # The inverse has a few numbers for every place, whatever E is.
        limit = max(2 * T * E, 32 * T * K) if name == "inverse" else 2 * T * E
        assert temporary <= limit, (name, temporary / (T * E))
        assert not re.search(rf"tensor<{T}x({K}x{E}|{E}x{K})x", text), name


# dense_to_topk.


@pytest.mark.parametrize("num_experts", [1, 5, 31, 32, 33, 64, 100])
def test_true_experts_are_those_of_the_loops(num_experts):
    """A1: in increasing order, padded with -1; the first K where there are more. Words of 32 bits
    that are full, empty and partial. Probs that no place names are NaN and never read."""
    T = 40
    for top_k in {1, 3, num_experts + 2}:
        run = jax.jit(functools.partial(ep.dense_to_topk, top_k=top_k))
        for seed in range(3):
            routing_map = make_map(T, num_experts, seed)
            ids = true_experts(routing_map, top_k)
            probs = make_floats(T, num_experts, seed=seed)
            probs[~routing_map] = np.nan
            topk_idx, topk_weights = run(routing_map, probs)
            assert_bitwise_equal(topk_idx, ids)
            assert_bitwise_equal(topk_weights, gathered(ids, probs))


def test_gradient_of_weights_scatters_back():
    """Every expert that is not chosen gets exactly 0, though NaN lies at the places of -1."""
    routing_map = make_map(12, 40)
    ids = true_experts(routing_map, 4)
    dout = make_floats(12, 4)
    dout[ids < 0] = np.nan
    probs = make_floats(12, 40, dtype=jnp.bfloat16)
    dprobs = pull(lambda p: ep.dense_to_topk(routing_map, p, 4)[1], probs, dout)
    case = Case(T=12, K=4, E=40, R=1)
    assert_bitwise_equal(dprobs, scattered(case, ids, dout)[1].astype(jnp.bfloat16))
    assert (np.asarray(dprobs) != 0).sum() == (ids >= 0).sum()


@pytest.mark.parametrize("maker", ["uniform", "masked", "empty_expert"])
def test_the_ways_there_and_back_are_inverse(maker):
    """A1: for ids that rise within each token; a map returns where K is large enough."""
    case = Case(T=20, K=5, E=48, R=1)
    ids = rising(case, make_ids(maker, case)[0])
    weights = np.where(ids < 0, 0, make_floats(*ids.shape)).astype(np.float32)
    again, weights_again = ep.dense_to_topk(*ep.topk_to_dense(ids, weights, case.E), case.K)
    assert_bitwise_equal(again, ids)
    assert_bitwise_equal(weights_again, weights)
    routing_map = make_map(case.T, case.E)
    there, _ = ep.dense_to_topk(routing_map, None, case.E)
    assert_bitwise_equal(ep.topk_to_dense(there, None, case.E)[0], routing_map)


def test_weights_in_shard_map_of_replicated_probs():
    """Each rank has other experts of the same probs; their gradients are summed."""
    case = Case(T=3, K=2, E=4, R=2)
    routing_map = np.stack([make_map(case.T, case.E, seed) for seed in range(2)])
    ids = np.stack([true_experts(each, case.K) for each in routing_map])
    probs, dout = make_floats(case.T, case.E), make_floats(case.R, case.T, case.K, seed=1)

    def gradient(routing_map, probs, dout):
        return jax.vjp(lambda p: ep.dense_to_topk(routing_map[0], p, case.K)[1], probs)[1](dout[0])

    specs = (jax.P("expert"), jax.P(), jax.P("expert"))
    run = jax.shard_map(gradient, mesh=make_mesh(2), in_specs=specs, out_specs=jax.P())
    expected = scattered(case, ids[0], dout[0])[1] + scattered(case, ids[1], dout[1])[1]
    assert_bitwise_equal(jax.jit(run)(routing_map, probs, dout)[0], expected)
