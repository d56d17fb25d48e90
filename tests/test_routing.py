"""The router against float64: choice, weights, gradients and masks (E, point 10)."""

import dataclasses
import itertools
import pathlib
import re
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routing_oracle as oracle
from helpers import AXIS, assert_bitwise_equal, make_floats, make_mesh
from jax.sharding import PartitionSpec as P
from routing_oracle import make_mask

import jax_moe_ep as ep
from jax_moe_ep import routing

TOKENS, EXPERTS, TOP_KS = (1, 7, 128, 8192), (8, 60, 256, 257), (1, 2, 8)
SCORES, GROUP_SCORES = get_args(routing.Score), get_args(routing.GroupScore)
# Options of the groups of each E: 257 is prime, so its groups have one expert.
GROUPS = {
    8: {"num_groups": 2, "top_groups": 1, "group_score": "max"},
    60: {"num_groups": 6, "top_groups": 2, "group_score": "max"},
    256: {"num_groups": 8, "top_groups": 4, "group_score": "top2"},
    257: {"num_groups": 257, "top_groups": 16, "group_score": "max"},
}


@dataclasses.dataclass(frozen=True)
class Case:
    T: int
    E: int
    config: ep.RouterConfig
    has_bias: bool
    has_mask: bool

    def __str__(self):
        c = self.config
        groups = f"{c.top_groups}of{c.num_groups}" if c.num_groups > 1 else "nogroups"
        extras = "bias" * self.has_bias + "mask" * self.has_mask
        weights = "normalized" if c.normalize else "plain"
        return f"T{self.T}-E{self.E}-K{c.top_k}-{c.score}-{groups}-{weights}-{extras}"


def make_case(index, E, K, score, has_groups):
    """T, bias, mask and normalization go round so that their values meet all of the others'."""
    groups = dict(GROUPS[E]) if has_groups else {}
    if has_groups and E == K == 8:
        groups["top_groups"] = 2  # all there are
    pair, rest = divmod(index, 4)  # (E, K) and (score, groups)
    config = ep.RouterConfig(
        K, score=score, normalize=K > 1 and (pair // 3 + rest) % 2 == 0, scale=2.5, **groups
    )
    T = TOKENS[(pair + rest) % 4]
    return Case(T, E, config, (pair + rest // 2) % 2 == 0, (pair // 2 + rest) % 2 == 0)


CASES = [
    make_case(index, *values)
    for index, values in enumerate(itertools.product(EXPERTS, TOP_KS, SCORES, (False, True)))
]


def test_cases_cover_every_pair():
    """All combinations of E, K, score and groups; every pair of values of any two axes."""
    names = ("T", "E", "K", "score", "groups", "bias", "mask", "normalize")
    values = [
        (c.T, c.E, r.top_k, r.score, r.num_groups > 1, c.has_bias, c.has_mask, r.normalize)
        for c in CASES
        for r in [c.config]
    ]
    assert len({v[1:5] for v in values}) == 4 * 3 * 2 * 2
    for a, b in itertools.combinations(range(len(names)), 2):
        met = {(v[a], v[b]) for v in values}
        missing = set(itertools.product({v[a] for v in values}, {v[b] for v in values})) - met
        assert missing == ({(1, True)} if (names[a], names[b]) == ("K", "normalize") else set())


route = jax.jit(ep.route, static_argnames="config")


# Against float64.


def tolerance(logits):
    """Relative to the terms of a sum: how far float32 may be from the exact value.

    With u = 2^-24 and D the largest distance between a logit and the one it is compared with, the
    difference has an error of D*u, which its exponential inherits; the sum of E exponentials adds
    at most E*u, the logarithm and its exponential 2*D*u, each function some units. A gradient has
    one more such factor and one more sum of E terms.
    """
    distance = np.abs(logits).max(initial=0) + np.ptp(logits, axis=-1).max(initial=0)
    return (2 * logits.shape[-1] + 8 * distance + 64) * 2.0**-24


def routed(logits, config, bias=None, mask=None):
    """Routing and, for random cotangents of weights and scores, the gradient of the logits."""
    dweights = make_floats(*logits.shape[:-1], config.top_k, seed=5)
    dscores = make_floats(*logits.shape, seed=6)

    def run(logits, bias, mask, cotangents):
        def outputs(logits, bias):
            r = ep.route(logits, config, bias=bias, mask=mask)
            return (r.topk_weights, r.scores), r

        _, backward, result = jax.vjp(outputs, logits, bias, has_aux=True)
        return result, *backward(cotangents)

    result = jax.jit(run)(logits, bias, mask, (dweights, dscores))
    return *jax.device_get(result), dweights, dscores


@pytest.mark.parametrize("case", CASES, ids=str)
def test_choice_weights_and_gradients(case):
    """The experts are exactly those of the float32 scores; the rest is within `tolerance`."""
    logits = 3 * make_floats(case.T, case.E, seed=case.E)
    bias = make_floats(case.E, seed=1) / case.E if case.has_bias else None
    mask = make_mask(case.T, seed=2) if case.has_mask else np.ones(case.T, bool)
    actual, dlogits, dbias, dweights, dscores = routed(
        logits, case.config, bias, mask if case.has_mask else None
    )

    choice = actual.scores if bias is None else actual.scores + bias
    idx = oracle.choose(choice, case.config)
    np.testing.assert_array_equal(actual.topk_idx, np.where(mask[:, None], idx, -1))
    scores = oracle.scores(logits, case.config)
    weights = oracle.weights(scores, idx, case.config)
    gradient, terms = oracle.dlogits(scores, idx, dweights, dscores, case.config)
    limit, is_token = tolerance(logits), mask[:, None]
    np.testing.assert_allclose(actual.scores, np.where(is_token, scores, 0), rtol=limit)
    np.testing.assert_allclose(actual.topk_weights, np.where(is_token, weights, 0), rtol=limit)
    assert (np.abs(dlogits - np.where(is_token, gradient, 0)) <= limit * terms * is_token).all()
    assert bias is None or not dbias.any()


def test_by_hand():
    """Scores 1/8, 4/8, 2/8, 1/8 (softmax of their logarithms); K = 2 takes experts 1 and 2.

    Plain weights 1/2 and 1/4; normalized 2/3 and 1/3; times 3: 2 and 1. A bias of 1/2 for expert 0
    puts it before expert 1, and its weight is still 1/8.
    """
    logits = np.log(np.array([[1, 4, 2, 1]], np.float32))
    plain = route(logits, ep.RouterConfig(2, normalize=False))
    assert plain.topk_idx.tolist() == [[1, 2]]
    np.testing.assert_allclose(plain.topk_weights, [[1 / 2, 1 / 4]], rtol=1e-6)
    scaled = route(logits, ep.RouterConfig(2, scale=3))
    np.testing.assert_allclose(scaled.topk_weights, [[2, 1]], rtol=1e-6)
    bias = np.array([1 / 2, 0, 0, 0], np.float32)
    biased = route(logits, ep.RouterConfig(2, normalize=False), bias=bias)
    assert biased.topk_idx.tolist() == [[0, 1]]
    np.testing.assert_allclose(biased.topk_weights, [[1 / 8, 1 / 2]], rtol=1e-6)


def test_groups_by_hand():
    """Sigmoid scores in tenths: groups (9, 1), (6, 5), (8, 2); one of the three stays.

    By the best expert group 0 wins, by the sum of two group 1 (11 against 10 and 10).
    """
    scores = np.array([[0.9, 0.1, 0.6, 0.5, 0.8, 0.2]])
    logits = np.log(scores / (1 - scores)).astype(np.float32)
    for group_score, experts in (("max", [0, 1]), ("top2", [2, 3])):
        config = ep.RouterConfig(2, score="sigmoid", num_groups=3, group_score=group_score)
        assert route(logits, config).topk_idx.tolist() == [experts]


@pytest.mark.parametrize("group_score", GROUP_SCORES)
def test_ties_go_to_the_lowest_group_and_expert(group_score):
    config = ep.RouterConfig(3, num_groups=4, top_groups=2, group_score=group_score)
    logits = np.zeros((2, 8), np.float32)
    logits[1, 4:] = 1  # groups 2 and 3
    assert route(logits, config).topk_idx.tolist() == [[0, 1, 2], [4, 5, 6]]


def test_experts_of_other_groups_are_never_chosen():
    """Group 1 wins by expert 4 alone, with a bias of 5; K = 4 takes the others of the group too,
    though their bias of -9 puts them below all of group 0."""
    bias = np.array([0, 0, 0, 0, 5, -9, -9, -9], np.float32)
    config = ep.RouterConfig(4, num_groups=2, group_score="max")
    routing = route(make_floats(64, 8), config, bias=bias)
    assert (np.sort(routing.topk_idx) == [4, 5, 6, 7]).all()
    assert (routing.topk_weights > 0).all()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("groups", [{}, {"num_groups": 4, "top_groups": 2}], ids=["", "groups"])
def test_nan_and_infinity_choose_different_experts(score, groups):
    """K of them in range, whatever the logits; NaN is seen in the scores of its token."""
    values = np.array([np.nan, np.inf, -np.inf, 0, 1], np.float32)
    logits = np.random.default_rng(0).choice(values, (256, 8))
    logits[:3] = values[:3, None]
    config = ep.RouterConfig(4, score=score, **groups)
    for bias in (None, np.array([np.nan, -np.inf, np.inf, 0, 0, 0, 0, 0], np.float32)):
        routing = jax.device_get(route(logits, config, bias=bias))
        ordered = np.sort(routing.topk_idx)
        assert (ordered >= 0).all()
        assert (ordered < 8).all()
        assert (np.diff(ordered) > 0).all()
        assert np.isnan(routing.scores[np.isnan(logits)]).all()
        if score == "softmax":
            assert np.isnan(routing.topk_weights[np.isnan(logits).any(1)]).all()


def test_nan_is_chosen_last():
    """Expert 1 is NaN and expert 3 has score 0, which is more."""
    logits = np.array([[0, np.nan, 1, -np.inf]], np.float32)
    config = ep.RouterConfig(3, score="sigmoid")
    assert route(logits, config).topk_idx.tolist() == [[2, 0, 3]]


def test_experts_that_are_off():
    """Logits of -inf: weight 0 where they must be taken, finite gradients everywhere."""
    logits = make_floats(32, 8)
    logits[:, 2:] = -np.inf
    for score in SCORES:
        result, dlogits, *_ = routed(logits, ep.RouterConfig(3, score=score))
        assert (np.sort(result.topk_idx[:, :2]) == [0, 1]).all()
        assert not result.topk_weights[:, 2].any()
        np.testing.assert_allclose(result.topk_weights.sum(1), 1, rtol=1e-6)
        assert np.isfinite(dlogits).all()
        assert not dlogits[:, 2:].any()


@pytest.mark.parametrize("score", SCORES)
def test_scores_that_underflow_have_weights_and_gradients(score):
    """Chosen by bias, experts 2 and 3 score exp(-200) and exp(-201): 0 in float32.

    Their normalized weights are those of the logits 1 and 0: 1/(1 + 1/e) and 1/(1 + e).
    """
    logits = np.full((4, 4), -200, np.float32)
    logits[:, 3] -= 1
    if score == "softmax":
        logits[:, :2] = 0
    bias = np.array([0, 0, 2, 2], np.float32)
    result, dlogits, *_ = routed(logits, ep.RouterConfig(2, score=score), bias)
    assert (result.topk_idx == [2, 3]).all()
    np.testing.assert_allclose(result.topk_weights[0], jax.nn.softmax(jnp.array([1.0, 0])), 1e-6)
    assert np.isfinite(dlogits).all()
    assert dlogits[:, 2:].all()


# Masks.


@pytest.mark.parametrize("score", SCORES)
def test_masked_tokens_are_not_routed(score):
    """D2, D6: -1, weight 0, score 0 and gradient 0, though their logits are NaN or infinite; the
    other rows are bitwise those of a run with other masked ones, and those of a run without any
    (D3) but for a bit: the CPU of jaxlib 0.12 rounds a sigmoid by its place in the array."""
    config = ep.RouterConfig(2, score=score, num_groups=2, top_groups=1)
    mask = make_mask(40)
    logits = make_floats(40, 8)
    logits[~mask] = np.random.default_rng(0).choice([np.nan, np.inf, -np.inf], (40, 8))[~mask]
    bias = make_floats(8, seed=3)
    actual, dlogits, dbias, *_ = routed(logits, config, bias, mask)
    assert (actual.topk_idx[~mask] == -1).all()
    for zeros in (actual.topk_weights[~mask], actual.scores[~mask], dlogits[~mask], dbias):
        assert_bitwise_equal(zeros, np.zeros_like(zeros))
    others, *_ = routed(np.where(mask[:, None], logits, 7), config, bias, mask)
    alone = jax.device_get(route(logits[mask], config, bias=bias))
    assert_bitwise_equal(actual.topk_idx[mask], alone.topk_idx)
    for name in ("topk_weights", "scores"):
        masked = getattr(actual, name)[mask]
        assert_bitwise_equal(masked, getattr(others, name)[mask], name)
        np.testing.assert_array_max_ulp(masked, getattr(alone, name), maxulp=1)
    assert dlogits[mask].any(1).all()


def test_no_bias_and_no_mask_are_zeros_and_ones():
    logits, config = make_floats(64, 8), ep.RouterConfig(2)
    without = route(logits, config)
    neutral = route(logits, config, bias=np.zeros(8, np.float32), mask=np.ones(64, bool))
    jax.tree.map(assert_bitwise_equal, neutral, without)


def test_masked_tokens_cost_no_rows():
    """A8: a plan counts the assignments of the real tokens only, and combine gives the others 0."""
    mask = make_mask(2, 12)
    config, ep_config = ep.RouterConfig(2), ep.EpConfig(4, AXIS, implementation="reference")

    def layer(logits, x, mask):
        routing = ep.route(logits, config, mask=mask)
        plan = ep.plan(routing.topk_idx, ep_config)
        out = ep.combine(ep.dispatch(x, plan), plan, routing.topk_weights)
        return out, ep.stats(plan), ep.expert_counts(routing.topk_idx, 4, axis_name=AXIS)

    spec = P(AXIS)
    run = jax.shard_map(layer, mesh=make_mesh(2), in_specs=spec, out_specs=(spec, P(), P()))
    x = make_floats(24, 8)
    out, stats, counts = jax.jit(run)(make_floats(24, 4, seed=1), x, mask.reshape(-1))
    assert stats.num_assignments == 2 * mask.sum() == counts.sum()
    np.testing.assert_array_equal(stats.expert_counts, counts)
    np.testing.assert_allclose(out, np.where(mask.reshape(-1, 1), x, 0), rtol=1e-5)


# Dtypes, shapes, memory.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_logits_of_16_bits_are_used_in_float32(dtype):
    logits, config = make_floats(64, 8, dtype=dtype), ep.RouterConfig(2)
    actual, dlogits, *_ = routed(logits, config)
    expected, dexpected, *_ = routed(logits.astype(np.float32), config)
    jax.tree.map(assert_bitwise_equal, actual, expected)
    assert_bitwise_equal(dlogits, dexpected.astype(dtype))


def test_any_leading_dimensions():
    config = ep.RouterConfig(2, num_groups=2)
    logits, mask = make_floats(2, 3, 4, 8), make_mask(2, 3, 4)
    shaped = route(logits, config, mask=mask)
    flat = route(logits.reshape(-1, 8), config, mask=mask.reshape(-1))
    one = route(logits[0, 0, 0], config)
    assert shaped.topk_idx.shape == (2, 3, 4, 2)
    jax.tree.map(lambda a, b: assert_bitwise_equal(a.reshape(b.shape), b), shaped, flat)
    np.testing.assert_array_equal(one.topk_idx, route(logits[0, 0], config).topk_idx[0])
    assert route(logits[:0], config).topk_idx.shape == (0, 3, 4, 2)


def test_no_temporary_with_k_and_e():
    """A4: with K = 32 a temporary [T, K, E] is 32*T*E bytes or more; all together stay below."""
    T, E, K = 512, 256, 32
    config = ep.RouterConfig(K, score="sigmoid", num_groups=8, top_groups=4)

    def loss(logits):
        routing = ep.route(logits, config)
        return ep.load_balance_loss(routing) + routing.topk_weights.sum()

    logits = jax.ShapeDtypeStruct((T, E), jnp.float32)
    ids = jax.ShapeDtypeStruct((T, K), jnp.int32)
    compiled = jax.jit(jax.grad(loss)).lower(logits).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 20 * T * E
    compiled = jax.jit(lambda ids: ep.expert_counts(ids, E)).lower(ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 20 * T * E


# Examples.


def test_docs_example_runs():
    """Its mask leaves 16 + 9 tokens with 8 experts each."""
    text = (pathlib.Path(__file__).parents[1] / "docs" / "routing.md").read_text()
    names = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
    assert ep.expert_counts(names["routing"].topk_idx, 64).sum() == 25 * 8
    assert np.isfinite(names["loss"])
    assert set(np.unique(names["bias"])) <= {np.float32(x) for x in (-1e-3, 0, 1e-3)}
