"""What every op must compute, as plain loops over NumPy arrays.

Written from the definition alone; nothing here imports the library. Arguments and results hold
one entry per rank in front: ids [R, T, K], rows [R, C, ...], and so on. Sums and products of
float32 arrays in NumPy are rounded one by one, as the definition of combine wants them.
"""

import math
from typing import Any

import numpy as np

LEAVES = (
    "slots",
    "owners",
    "group_counts",
    "group_sizes",
    "group_starts",
    "source_counts",
    "num_assignments",
    "num_dropped",
    "required_rows",
)


def capacity(case: Any) -> int:
    """C: an int as it stands, else the worst case, with the live rows limited by a factor."""
    if isinstance(case.capacity, int):
        return case.capacity
    A, L, G = case.A, case.E // case.R, case.R * case.T
    most_per_token = min(case.K, L) if case.distinct_experts else case.K
    most_per_expert = G if case.distinct_experts else G * case.K
    if case.expert_capacity is not None:
        most_per_expert = min(most_per_expert, expert_limit(case))
    N = min(G * most_per_token, L * most_per_expert)
    if case.capacity is not None:
        N = min(math.ceil(case.capacity * case.T * case.K), N)
    if case.empty_groups == "block":
        all_full = L * math.ceil(max(most_per_expert, 1) / A) * A
        all_scattered = L * A + max(N - 1, 0) // A * A
    else:
        all_full = L * math.ceil(most_per_expert / A) * A
        all_scattered = (N + (A - 1) * min(L, N)) // A * A
    return min(all_full, all_scattered)


def expert_limit(case: Any) -> int:
    """The most rows an expert keeps."""
    if case.expert_capacity is None:
        return case.R * case.T * case.K
    if isinstance(case.expert_capacity, float):
        return math.ceil(case.expert_capacity * (case.R * case.T * case.K) / case.E)
    return case.expert_capacity


def aligned(count: int, case: Any) -> int:
    """The size of a group with `count` live rows."""
    blocks = math.ceil(count / case.A)
    if blocks == 0 and case.empty_groups == "block":
        blocks = 1
    return blocks * case.A


def plan(case: Any, ids: np.ndarray, priority: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Every array of the Plan, on every rank."""
    T, K, R, E = case.T, case.K, case.R, case.E
    L, C = E // R, capacity(case)
    assignments: list[list[tuple[int, int, int]]] = [[] for _ in range(E)]
    for r in range(R):
        for t in range(T):
            for k in range(K):
                if 0 <= int(ids[r, t, k]) < E:
                    assignments[int(ids[r, t, k])].append((r, t, k))

    out = {
        "slots": np.full((R, R * T, K), -1, np.int32),
        "owners": np.full((R, T, K), -1, np.int32),
        "group_counts": np.zeros((R, L), np.int32),
        "group_sizes": np.zeros((R, L), np.int32),
        "group_starts": np.zeros((R, L), np.int32),
        "source_counts": np.zeros((R, R, L), np.int32),
        "num_assignments": np.zeros(R, np.int32),
        "num_dropped": np.zeros(R, np.int32),
        "required_rows": np.zeros(R, np.int32),
    }
    for rank in range(R):
        mine = assignments[rank * L : (rank + 1) * L]
        wanted = [min(len(members), expert_limit(case)) for members in mine]
        cap = max(wanted)
        while sum(aligned(min(n, cap), case) for n in wanted) > C:
            cap -= 1
        start = 0
        for e, members in enumerate(mine):
            if priority is None:
                order = members
            else:
                order = sorted(members, key=lambda a: (*_by_priority(priority[a]), a))
            kept = sorted(order[: min(wanted[e], cap)])
            for row, (r, t, k) in enumerate(kept, start):
                out["slots"][rank, r * T + t, k] = row
                out["owners"][r, t, k] = rank
                out["source_counts"][rank, r, e] += 1
            out["group_starts"][rank, e] = start
            out["group_counts"][rank, e] = len(kept)
            out["group_sizes"][rank, e] = aligned(len(kept), case)
            start += aligned(len(kept), case)
            out["num_assignments"][rank] += len(members)
            out["num_dropped"][rank] += len(members) - len(kept)
            out["required_rows"][rank] += aligned(len(members), case)
    return out


def _by_priority(value: float) -> tuple[bool, float]:
    """Sorts the highest first and NaN last; Python's == holds between -0.0 and +0.0."""
    return (True, 0.0) if math.isnan(value) else (False, -float(value))


def row_sources(case: Any, slots: np.ndarray) -> np.ndarray:
    """(source rank * T + token) * K + k of every row, or -1: [R, C]."""
    sources = np.full((case.R, capacity(case)), -1, np.int32)
    for rank, token, k in np.ndindex(slots.shape):
        if slots[rank, token, k] >= 0:
            sources[rank, slots[rank, token, k]] = token * case.K + k
    return sources


def dispatch(case: Any, x: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """x [R, T, ...] -> rows [R, C, ...], zero where no token is."""
    rows = np.zeros((case.R, capacity(case), *x.shape[2:]), x.dtype)
    for rank, token, k in np.ndindex(slots.shape):
        if slots[rank, token, k] >= 0:
            rows[rank, slots[rank, token, k]] = x[token // case.T, token % case.T]
    return rows


def combine(
    case: Any,
    y: np.ndarray,
    slots: np.ndarray,
    owners: np.ndarray,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """y [R, C, ...] -> [R, T, ...]: partials by expert's rank, then their sum by rank."""
    out = np.zeros((case.R, case.T, *y.shape[2:]), y.dtype)
    for source, t in np.ndindex(case.R, case.T):
        total = np.zeros(y.shape[2:], np.float32)
        for rank in range(case.R):
            if rank not in owners[source, t]:
                continue
            partial = np.zeros(y.shape[2:], np.float32)
            for k in range(case.K):
                row = slots[rank, source * case.T + t, k]
                if row < 0:
                    continue
                value = y[rank, row].astype(np.float32)
                if weights is not None:
                    value = np.float32(weights[source, t, k]) * value
                partial = partial + value
            total = total + partial.astype(y.dtype).astype(np.float32)
        out[source, t] = total.astype(y.dtype)
    return out


def combine_backward(
    case: Any, dout: np.ndarray, y: np.ndarray, slots: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """dy in y's dtype, exact; dw in float64, to compare with a tolerance."""
    dy = np.zeros_like(y)
    dw = np.zeros(weights.shape, np.float64)
    for rank, token, k in np.ndindex(slots.shape):
        row, source, t = slots[rank, token, k], token // case.T, token % case.T
        if row >= 0:
            gradient = dout[source, t].astype(np.float32)
            dy[rank, row] = (np.float32(weights[source, t, k]) * gradient).astype(y.dtype)
            dw[source, t, k] = np.sum(
                dout[source, t].astype(np.float64) * y[rank, row].astype(np.float64)
            )
    return dy, dw


def row_weights(case: Any, weights: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """The weight of every row, [R, C]; 0 where no row lives."""
    rows = np.zeros((case.R, capacity(case)), weights.dtype)
    for rank, token, k in np.ndindex(slots.shape):
        if slots[rank, token, k] >= 0:
            rows[rank, slots[rank, token, k]] = weights[token // case.T, token % case.T, k]
    return rows
