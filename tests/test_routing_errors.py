"""The options of a router, and every error of the router helpers by its text."""

import dataclasses
import pickle

import jax
import numpy as np
import pytest
from errors import raises
from helpers import make_floats

import jax_moe_ep as ep

route = jax.jit(ep.route, static_argnames="config")


def shows(**options):
    """Whether the option changes the routing of some tokens."""
    base = {"num_groups": 4, "top_groups": 2} if "group" in str(options) else {}
    logits = 3 * make_floats(64, 8)
    before = route(logits, ep.RouterConfig(2, **base))
    after = route(logits, ep.RouterConfig(**{"top_k": 2, **base, **options}))
    return not np.array_equal(before.topk_idx, after.topk_idx) or not np.allclose(
        before.topk_weights, after.topk_weights
    )


EFFECTS = {
    "top_k": {"top_k": 3},
    "score": {"score": "sigmoid"},
    "normalize": {"normalize": False},
    "scale": {"scale": 2.0},
    "num_groups": {"num_groups": 2, "top_groups": 1},
    "top_groups": {"top_groups": 1},
    "group_score": {"group_score": "max"},
}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ep.RouterConfig)])
def test_every_option_has_its_effect(name):
    """A9: no option is accepted and ignored."""
    assert shows(**EFFECTS[name])


INVALID = [
    ({"top_k": 0}, ValueError, "RouterConfig: top_k must be between 1 and 2147483647, got 0"),
    ({"top_k": 2.0}, TypeError, "RouterConfig: top_k must be an int, got 2.0"),
    ({"num_groups": True}, TypeError, "RouterConfig: num_groups must be an int, got True"),
    ({"score": "tanh"}, ValueError, "score must be one of 'softmax', 'sigmoid', got 'tanh'"),
    ({"group_score": 2}, ValueError, "group_score must be one of 'max', 'top2', got 2"),
    ({"normalize": 1}, TypeError, "RouterConfig: normalize must be a bool, got 1"),
    ({"scale": 0}, ValueError, "scale must be positive and finite, got 0"),
    ({"scale": float("inf")}, ValueError, "scale must be positive and finite, got inf"),
    ({"scale": float("nan")}, ValueError, "scale must be positive and finite, got nan"),
    ({"scale": "1"}, TypeError, "RouterConfig: scale must be a number, got '1'"),
    ({"top_groups": 2}, ValueError, "RouterConfig: top_groups=2 exceeds num_groups=1"),
    ({"top_k": 1}, ValueError, "normalize=True with top_k=1", "Set normalize=False"),
]


@pytest.mark.parametrize("invalid", INVALID, ids=lambda invalid: str(invalid[0]))
def test_invalid_options(invalid):
    options, error, *parts = invalid
    with raises(error, *parts):
        ep.RouterConfig(**{"top_k": 2, **options})


def test_config_is_frozen_hashable_and_picklable():
    config = ep.RouterConfig(2, scale=2)
    assert config == ep.RouterConfig(2, scale=2.0)
    assert hash(config) == hash(ep.RouterConfig(2, scale=2.0))
    assert config != ep.RouterConfig(2)
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 3
    with pytest.raises(TypeError, match="positional"):
        ep.RouterConfig(2, "softmax")


LOGITS = np.zeros((3, 8), np.float32)
ROUTING = ep.Routing(np.zeros((3, 2), np.int32), np.zeros((3, 2), np.float32), LOGITS)


def route_with(logits=LOGITS, bias=None, mask=None, **options):
    return ep.route(logits, ep.RouterConfig(**{"top_k": 2, **options}), bias=bias, mask=mask)


ERRORS = {
    "config": (lambda: ep.route(LOGITS, 2), TypeError, "config must be a RouterConfig, got 2"),
    "logits_dtype": (
        lambda: route_with(LOGITS.astype(np.int32)),
        TypeError,
        "jax_moe_ep.route: logits must be floating, got int32",
    ),
    "logits_shape": (
        lambda: route_with(np.float32(1)),
        ValueError,
        "jax_moe_ep.route: logits must have a last dimension of E experts",
    ),
    "groups": (
        lambda: route_with(num_groups=3),
        ValueError,
        "jax_moe_ep.route: E = 8 experts are not a multiple of num_groups=3",
    ),
    "small_groups": (
        lambda: route_with(num_groups=8, top_groups=4),
        ValueError,
        "group_score='top2' needs groups of 2 experts or more, got 8 experts in 8 groups",
    ),
    "top_k": (
        lambda: route_with(top_k=9),
        ValueError,
        "jax_moe_ep.route: top_k=9 exceeds the 8 experts a token may choose from",
    ),
    "top_k_of_groups": (
        lambda: route_with(top_k=3, num_groups=4),
        ValueError,
        "top_k=3 exceeds the 2 experts a token may choose from: 8 experts, 1 of 4 groups",
    ),
    "bias_shape": (
        lambda: route_with(bias=np.zeros(7, np.float32)),
        ValueError,
        "jax_moe_ep.route: bias must be [E] = (8,) as in logits, got shape (7,)",
    ),
    "bias_dtype": (
        lambda: route_with(bias=np.zeros(8, np.int32)),
        TypeError,
        "jax_moe_ep.route: bias must be floating, got int32",
    ),
    "mask_dtype": (
        lambda: route_with(mask=np.ones(3, np.int32)),
        TypeError,
        "jax_moe_ep.route: mask must be bool, True for real tokens, got int32. Write mask != 0",
    ),
    "mask_shape": (
        lambda: route_with(mask=np.ones((3, 1), bool)),
        ValueError,
        "jax_moe_ep.route: mask must have a bool for every token, (3,), got shape (3, 1)",
    ),
    "counts_dtype": (
        lambda: ep.expert_counts(LOGITS, 8),
        TypeError,
        "jax_moe_ep.expert_counts: topk_idx must be int32 or int64, got float32",
    ),
    "counts_experts": (
        lambda: ep.expert_counts(ROUTING.topk_idx, 8.0),
        ValueError,
        "jax_moe_ep.expert_counts: num_experts must be an int of at least 1, got 8.0",
    ),
    "counts_axis_type": (
        lambda: ep.expert_counts(ROUTING.topk_idx, 8, axis_name=None),
        TypeError,
        "jax_moe_ep.expert_counts: axis_name must be a mesh axis name or a tuple of different",
    ),
    "counts_axis": (
        lambda: ep.expert_counts(ROUTING.topk_idx, 8, axis_name="data"),
        ValueError,
        "jax_moe_ep.expert_counts: axis 'data' is not bound here",
    ),
    "balance_routing": (
        lambda: ep.load_balance_loss(LOGITS),
        TypeError,
        "jax_moe_ep.load_balance_loss: routing must be a Routing, got ndarray",
    ),
    "balance_per": (
        lambda: ep.load_balance_loss(ROUTING, per="token"),
        ValueError,
        "load_balance_loss: per must be one of 'batch', 'sequence', got 'token'",
    ),
    "balance_tokens": (
        lambda: ep.load_balance_loss(dataclasses.replace(ROUTING, topk_idx=ROUTING.topk_idx[:2])),
        ValueError,
        "topk_idx [..., K] and scores [..., E] of routing must agree, got shapes (2, 2) and (3, 8)",
    ),
    "balance_mask": (
        lambda: ep.load_balance_loss(ROUTING, mask=np.ones(8, bool)),
        ValueError,
        "jax_moe_ep.load_balance_loss: mask must have a bool for every token, (3,)",
    ),
    "balance_sequence": (
        lambda: ep.load_balance_loss(jax.tree.map(lambda x: x[0], ROUTING), per="sequence"),
        ValueError,
        "per='sequence' needs scores [..., S, E], got shape (8,)",
    ),
    "balance_axis_of_batch": (
        lambda: ep.load_balance_loss(ROUTING, sequence_axis_name="seq"),
        ValueError,
        "sequence_axis_name='seq' is given, but per='batch' has no sequences",
    ),
    "balance_axis_twice": (
        lambda: ep.load_balance_loss(
            ROUTING, per="sequence", axis_name=("a", "b"), sequence_axis_name="b"
        ),
        ValueError,
        "['b'] are in axis_name and in sequence_axis_name",
    ),
    "balance_axis": (
        lambda: ep.load_balance_loss(ROUTING, axis_name="data"),
        ValueError,
        "jax_moe_ep.load_balance_loss: axis 'data' is not bound here",
    ),
    "z_dtype": (
        lambda: ep.z_loss(ROUTING.topk_idx),
        TypeError,
        "jax_moe_ep.z_loss: logits must be floating, got int32",
    ),
    "z_axis": (
        lambda: ep.z_loss(LOGITS, axis_name="data"),
        ValueError,
        "jax_moe_ep.z_loss: axis 'data' is not bound here",
    ),
    "update_counts": (
        lambda: ep.update_bias(LOGITS[0], LOGITS[0], rate=1),
        TypeError,
        "jax_moe_ep.update_bias: expert_counts must be integers, got float32",
    ),
    "update_bias": (
        lambda: ep.update_bias(np.zeros(8, np.int32), np.zeros(8, np.int32), rate=1),
        TypeError,
        "jax_moe_ep.update_bias: bias must be floating, got int32",
    ),
    "update_shape": (
        lambda: ep.update_bias(LOGITS[0], np.zeros(7, np.int32), rate=1),
        ValueError,
        "jax_moe_ep.update_bias: bias and expert_counts must be [E], got (8,) and (7,)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    """The text names the function, the argument, what was given and what is expected."""
    call, error, text = ERRORS[name]
    with raises(error, text):
        call()
