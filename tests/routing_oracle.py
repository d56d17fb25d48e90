"""What a router must compute, in float64 over NumPy arrays [T, E].

Written from the definition alone; nothing here imports the library. Only the choice of experts is
made on the float32 scores that the library returned: near ties are decided by their roundings.
"""

from typing import Any

import numpy as np


def make_mask(*shape: int, seed: int = 0) -> np.ndarray:
    """True for three tokens of four."""
    return np.random.default_rng(seed).random(shape) < 0.75


def best(values: np.ndarray, num: int) -> np.ndarray:
    """The indices of the largest values of each row, best first, equal ones in their order."""
    return np.argsort(-values, axis=-1, kind="stable")[..., :num]


def choose(choice: np.ndarray, config: Any) -> np.ndarray:
    """[T, K]; choice [T, E] are finite float32 scores plus bias."""
    groups = choice.reshape(len(choice), config.num_groups, -1)
    ordered = -np.sort(-groups, axis=-1)
    value = ordered[..., : 1 if config.group_score == "max" else 2].sum(-1)
    is_eligible = np.zeros(value.shape, bool)
    np.put_along_axis(is_eligible, best(value, config.top_groups), True, axis=-1)
    return best(
        np.where(is_eligible[..., None], groups, -np.inf).reshape(choice.shape), config.top_k
    )


def scores(logits: np.ndarray, config: Any) -> np.ndarray:
    logits = logits.astype(np.float64)
    if config.score == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def weights(scores: np.ndarray, idx: np.ndarray, config: Any) -> np.ndarray:
    chosen = np.take_along_axis(scores, idx, -1)
    return config.scale * chosen / (chosen.sum(-1, keepdims=True) if config.normalize else 1)


def dlogits(
    scores: np.ndarray, idx: np.ndarray, dweights: np.ndarray, dscores: np.ndarray, config: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The gradient of <dweights, weights> + <dscores, scores>, and the sum of its terms' sizes."""
    chosen = np.take_along_axis(scores, idx, -1)
    results = []
    for sign, size in ((-1, lambda x: x), (1, np.abs)):
        dw = config.scale * size(dweights.astype(np.float64))
        if config.normalize:
            total = chosen.sum(-1, keepdims=True)
            dw = (dw + sign * (dw * chosen).sum(-1, keepdims=True) / total) / total
        ds = size(dscores.astype(np.float64))
        np.put_along_axis(ds, idx, np.take_along_axis(ds, idx, -1) + dw, -1)
        if config.score == "sigmoid":
            results.append(ds * scores * (1 - scores))
        else:
            results.append(scores * (ds + sign * (ds * scores).sum(-1, keepdims=True)))
    return results[0], results[1]


def counts(idx: np.ndarray, num_experts: int) -> np.ndarray:
    named = idx[(idx >= 0) & (idx < num_experts)]
    return np.bincount(named.reshape(-1), minlength=num_experts)


def balance(idx: np.ndarray, scores: np.ndarray) -> tuple[float, np.ndarray]:
    """The loss of tokens [N, K] and [N, E] that all count, and its gradient in the scores."""
    if len(idx) == 0:
        return 0.0, np.zeros(scores.shape)
    num_tokens, num_experts = scores.shape
    sums = scores.astype(np.float64).sum(1, keepdims=True)
    shares = scores / sums
    pull = num_experts * counts(idx, num_experts) / idx.size / num_tokens  # d loss / d share
    dscores = (pull - (pull * shares).sum(1, keepdims=True)) / sums
    return float((pull * shares).sum()), dscores


def squared_logsumexp(logits: np.ndarray) -> tuple[float, np.ndarray]:
    """The z loss of tokens [N, E] that all count, and its gradient."""
    if len(logits) == 0:
        return 0.0, np.zeros(logits.shape)
    powers = np.exp(logits.astype(np.float64))
    z = np.log(powers.sum(1, keepdims=True))
    dlogits = 2 * z * powers / powers.sum(1, keepdims=True) / len(logits)
    return float((z**2).mean()), dlogits
