"""Steps of the ops with new values in each, checked on the device: what test_group_reuse.py runs
while a rank is late.

Every program is one rank's and returns how many elements were wrong. Values are small integers made
from their places and the step, so that sums are exact and what an earlier or later step left is
wrong. Nothing else in a step waits for other ranks: one that needs nothing of them runs ahead.
"""

import jax
import jax.numpy as jnp
from helpers import AXIS
from jax import lax

import jax_moe_ep as ep

GROWTH = 16  # of x in a step


def tokens(places, hidden):
    """x before the first step, of the tokens at these places among all ranks'."""
    return ((7 * places[:, None] + jnp.arange(hidden)) % 101).astype(jnp.float32)


def my_places(ids):
    return lax.axis_index(AXIS) * ids.shape[0] + jnp.arange(ids.shape[0])


def wrong_rows(rows, source, top_k, grown):
    """Rows that are not those of tokens that have grown; others must be 0."""
    want = tokens(source // top_k, rows.shape[1]) + grown
    return (rows != jnp.where(source[:, None] >= 0, want, 0)).sum()


def count_over(num_steps, step, *carry):
    """What step(i, *carry) -> (*carry, wrong) finds wrong in all steps."""

    def add(i, state):
        *carry, wrong = state
        *carry, found = step(i, *carry)
        return *carry, wrong + found

    return lax.fori_loop(0, num_steps, add, (*carry, jnp.zeros((), jnp.int32)))[-1]


def dispatch_steps(ids, *, config, hidden, num_steps):
    """x is written anew where it was, right after each dispatch."""
    plan = ep.plan(ids, config)
    source = ep.row_sources(plan)

    def step(i, x):
        rows = ep.dispatch(x, plan)
        return x + GROWTH, wrong_rows(rows, source, plan.top_k, GROWTH * i)

    return count_over(num_steps, step, tokens(my_places(ids), hidden))


def slow_dispatch_steps(ids, num_slow, *, config, hidden, num_steps):
    """The same, but x grows num_slow times by one, by kernels that the host waits for."""
    plan = ep.plan(ids, config)
    source = ep.row_sources(plan)

    def step(i, x):
        rows = ep.dispatch(x, plan)
        x = lax.fori_loop(0, num_slow, lambda _, x: x + 1, x + (GROWTH - num_slow))
        return x, wrong_rows(rows, source, plan.top_k, GROWTH * i)

    return count_over(num_steps, step, tokens(my_places(ids), hidden))


def weights_of(assignments, i):
    """1, 2 or 3, for numbers of assignments among all ranks' and the step."""
    return ((assignments + i) % 3 + 1).astype(jnp.float32)


def weighted_sums(ids, plan, i):
    """Weights, y and the combined value of each token: a row of rank r is r + 1 + i everywhere."""
    places = my_places(ids)[:, None] * plan.top_k + jnp.arange(plan.top_k)
    weights = weights_of(places, i)
    y = jnp.full(plan.capacity, lax.axis_index(AXIS) + 1 + i, jnp.float32)[:, None]
    landed = jnp.where(plan.owners >= 0, plan.owners + 1 + i, 0)
    return weights, y, (weights * landed).sum(1, keepdims=True)


def combine_steps(ids, *, config, hidden, num_steps):
    """A weighted combine and its gradient with y, weights and dout new in each."""
    plan = ep.plan(ids, config)
    source = ep.row_sources(plan)

    def gradients(places, i):
        return ((places[:, None] + jnp.arange(hidden) + i) % 5).astype(jnp.float32)

    def step(i):
        weights, y, want = weighted_sums(ids, plan, i)
        y = jnp.broadcast_to(y, (plan.capacity, hidden))
        dout = gradients(my_places(ids), i)
        out, pull = jax.vjp(lambda y, w: ep.combine(y, plan, w), y, weights)
        dy, dweights = pull(dout)
        want_dy = weights_of(source, i)[:, None] * gradients(source // plan.top_k, i)
        want_dy = jnp.where(source[:, None] >= 0, want_dy, 0)
        want_dweights = (plan.owners + 1 + i) * dout.sum(1, keepdims=True)
        want_dweights = jnp.where(plan.owners >= 0, want_dweights, 0)
        return ((out != want).sum() + (dy != want_dy).sum() + (dweights != want_dweights).sum(),)

    return count_over(num_steps, step)


def mixed_steps(ids, *, config, hidden, num_steps):
    """Two calls of dispatch and a weighted combine of narrower rows, whose parts of an arena lie
    over each other; no call needs another one's result."""
    plan = ep.plan(ids, config)
    source = ep.row_sources(plan)

    def step(i, x):
        wrong = wrong_rows(ep.dispatch(x, plan), source, plan.top_k, GROWTH * i)
        wrong += wrong_rows(ep.dispatch(x + 1, plan), source, plan.top_k, GROWTH * i + 1)
        weights, y, want = weighted_sums(ids, plan, i)
        out = ep.combine(jnp.broadcast_to(y, (plan.capacity, 16)), plan, weights)
        return x + GROWTH, wrong + (out != want).sum()

    return count_over(num_steps, step, tokens(my_places(ids), hidden))
