"""The custom calls of programs for CUDA, which need the extension to be lowered, but no GPU."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
from helpers import on_ranks

import jax_moe_ep as ep


def calls_of_a_layer(mesh, axes, case, dtype=np.float32, **options):
    """Forward and backward of a layer on a group over these axes, or on one rank with ()."""
    config = dataclasses.replace(case.config("cuda", axes), **options)

    def loss(x, ids, weights):
        plan = ep.plan(ids, config)
        rows = ep.dispatch(x, plan)
        scaled = rows * ep.row_weights(weights, plan)[:, None].astype(rows.dtype)
        return ep.combine(scaled, plan, weights).astype(jnp.float32).sum()

    run = on_ranks(jax.grad(loss, (0, 2)), mesh, tuple(mesh.axis_names))
    shape = mesh.devices.shape
    args = (
        np.zeros((*shape, case.T, case.H), dtype),
        np.zeros((*shape, case.T, case.K), np.int32),
        np.zeros((*shape, case.T, case.K), np.float32),
    )
    return custom_calls(run, *args)


def custom_calls(run, *args):
    """Name and text of each of our calls in the program for CUDA."""
    text = run.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    found = [re.search(r"custom_call @jax_moe_ep_(\w+)\(", line) for line in text.splitlines()]
    return [(call[1], call.string) for call in found if call]


def attribute(call, name):
    found = re.search(rf"\b{name} = (?:dense<([^>]*)>|(-?\w+))", call)
    assert found, f"no {name} in {call}"
    return found[1] or found[2]
