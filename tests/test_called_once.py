"""That XLA makes each call once, also where a scan saves its results for the backward pass."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import NUM_RANKS, ON_GPUS, Case, make_floats, make_ids, make_mesh, on_ranks, sizes

import jax_moe_ep as ep
from jax_moe_ep import cuda, grouped_matmul

needs_extension = pytest.mark.skipif(not cuda.has_extension(), reason="needs the CUDA extension")


def gradient_of_a_scan(num_ranks, implementation, has_row_weights=False):
    """Of layers that save plan, rows and results, all in multiples of 128 bytes."""
    case = Case(T=64, K=2, E=32 * num_ranks, R=num_ranks, H=64, A=8)
    config = case.config(implementation)

    def layer(x, each):
        ids, weights, scale = each
        plan = ep.plan(ids, config)
        y = jnp.sin(ep.dispatch(x, plan)) * scale
        if has_row_weights:
            y *= ep.row_weights(weights, plan)[:, None]
        return x + ep.combine(y, plan, weights), None

    def loss(x, *each):
        return jnp.sum(jax.lax.scan(layer, x, each)[0] ** 2)

    ids = np.stack([make_ids("uniform", case, seed) for seed in range(3)], 1)
    weights = make_floats(num_ranks, 3, case.T, case.K)
    scales = make_floats(num_ranks, 3, config.num_rows(num_ranks, case.T, case.K), case.H)
    x = make_floats(num_ranks, case.T, case.H)
    run = on_ranks(jax.grad(loss, (0, 2, 3)), make_mesh(num_ranks))
    return run, (x, ids, weights, scales)


@needs_extension
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_results_pass_a_barrier(num_ranks):
    """Whoever uses a result of a call gets it from an optimization barrier."""
    run, args = gradient_of_a_scan(num_ranks, "cuda", has_row_weights=True)
    lines = run.trace(*args).lower(lowering_platforms=("cuda",)).as_text().splitlines()
    uses = 0
    for start, line in enumerate(lines):
        if "custom_call @jax_moe_ep" not in line:
            continue
        indent, name = re.match(r"(\s*)(%\w+)(?::\d+)? = ", line).groups()
        for later in lines[start + 1 :]:
            if not later.startswith(indent):  # names are a region's own
                break
            if re.search(rf"{name}\b", later):
                assert "optimization_barrier" in later, f"{later} uses {line}"
                uses += 1
    assert uses >= 7


@pytest.mark.skipif(not ON_GPUS, reason="needs GPUs")
@pytest.mark.parametrize("num_ranks", sizes(1, NUM_RANKS))
def test_xla_makes_every_call_once(num_ranks):
    """The forward and the backward pass have a combine each."""
    run, args = gradient_of_a_scan(num_ranks, "cuda")
    compiled = run.lower(*args).compile()
    calls = re.findall(r'custom_call_target="jax_moe_ep_(?:group_)?(\w+)"', compiled.as_text())
    assert collections.Counter(calls) == {
        "plan": 1,
        "dispatch": 1,
        "combine": 2,
        "combine_backward": 1,
    }
    expected, _ = gradient_of_a_scan(num_ranks, "reference")
    for actual, wanted in zip(compiled(*args), expected(*args), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)


def test_results_of_experts_pass_a_barrier(monkeypatch):
    kernels = grouped_matmul._differentiated(jax.lax.ragged_dot)
    monkeypatch.setattr(grouped_matmul, "_backends", lambda: (kernels, kernels))

    def lowered(platform):
        args = jnp.ones((8, 4)), jnp.ones((2, 4, 6)), jnp.array([5, 3], jnp.int32)
        traced = jax.jit(grouped_matmul.grouped_matmul).trace(*args)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "optimization_barrier" in lowered("cuda")
    assert "optimization_barrier" not in lowered("cpu")
