"""Routing maps as plain loops over NumPy arrays, and how the tests make them."""

import numpy as np


def make_map(num_tokens, num_experts, seed=0):
    """[T, E] with tokens of any number of experts, none and all among them."""
    random = np.random.default_rng(seed)
    share = np.linspace(0, 1, max(num_tokens, 1))[:num_tokens, None]
    return random.random((num_tokens, num_experts)) < share


def scattered(case, ids, weights):
    routing_map = np.zeros((case.T, case.E), bool)
    probs = np.zeros((case.T, case.E), np.float32)
    for t, k in np.ndindex(ids.shape):
        if 0 <= ids[t, k] < case.E:
            routing_map[t, ids[t, k]] = True
            probs[t, ids[t, k]] += np.float32(weights[t, k])
    return routing_map, probs


def gathered(ids, dense):
    """The value of every place's expert; +0 where there is none."""
    values = np.zeros(ids.shape, np.float32)
    for t, k in np.ndindex(ids.shape):
        if 0 <= ids[t, k] < dense.shape[1]:
            values[t, k] = dense[t, ids[t, k]]
    return values


def true_experts(routing_map, top_k):
    ids = np.full((len(routing_map), top_k), -1, np.int32)
    for t, row in enumerate(routing_map):
        found = [e for e, is_named in enumerate(row) if is_named][:top_k]
        ids[t, : len(found)] = found
    return ids


def rising(case, ids):
    """The same experts of every token in increasing order, -1 last."""
    ids = np.sort(np.where((ids < 0) | (ids >= case.E), case.E, ids), axis=-1)
    return np.where(ids == case.E, -1, ids).astype(np.int32)
