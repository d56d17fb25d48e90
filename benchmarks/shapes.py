"""The shapes of the benchmarks, and the bytes each op must move."""

import dataclasses
import math
from typing import Any

import numpy as np

import jax_moe_ep as ep


@dataclasses.dataclass(frozen=True)
class Shape:
    """One point: the letters of Plan, bf16, E experts of R ranks, uniform routing."""

    T: int = 4096
    H: int = 7168
    K: int = 8
    A: int = 128
    tail: str = "undefined"
    E: int = 256
    R: int = 1

    @property
    def row_bytes(self) -> int:
        return 2 * self.H

    def config(self, **options: Any) -> ep.EpConfig:
        return ep.EpConfig(self.E, "expert", alignment=self.A, tail=self.tail, **options)

    def ids(self, random: np.random.Generator) -> np.ndarray:
        """[R*T, K]: K different experts for each token, all equally likely."""
        scores = random.random((self.R * self.T, self.E), np.float32)
        return np.argpartition(scores, self.K - 1, axis=1)[:, : self.K].astype(np.int32)


def sweep() -> list[Shape]:
    """The standard point with one letter changed at a time, with both tails."""
    changes = [{}, {"T": 1}, {"T": 128}, {"T": 32768}, {"H": 512}, {"H": 2048}, {"H": 4096}]
    changes += [{"K": 1}, {"K": 2}, {"A": 1}, {"A": 16}]
    return [Shape(**change, tail=tail) for change in changes for tail in ("undefined", "zero")]


def bytes_moved(
    op: str,
    shape: Shape,
    live_rows: int,
    aligned_rows: int,
    capacity: int,
    own_tokens: int | None = None,
    remote_tokens: int = 0,
) -> int:
    """What one rank's memory must read and write; padding and a zero tail are written too.

    own_tokens are those of my tokens that have a row on my rank, all of them on one rank alone;
    remote_tokens counts for each of my tokens the other ranks that have one of its rows.

    dispatch            tokens read by me and by my peers, rows written
    combine             rows read, the peers' partials of my tokens written and read, tokens written
    combine_backward    tokens read by me and by my peers, rows read, their gradients written

    Numbers of four bytes (the plan, weights and their gradients) are left out, and so is the copy
    of the tokens into shared memory that groups of several processes make.
    """
    written_rows = capacity if shape.tail == "zero" else aligned_rows
    tokens = (shape.T if own_tokens is None else own_tokens) + remote_tokens
    return (
        shape.row_bytes
        * {
            "dispatch": tokens + written_rows,
            "combine": live_rows + 2 * remote_tokens + shape.T,
            "combine_backward": tokens + live_rows + written_rows,
        }[op]
    )


# Groups of several ranks.

TYPICAL_EXCESS = 1.05  # live rows of the fullest rank, over the mean


@dataclasses.dataclass(frozen=True)
class GroupShape(Shape):
    """One point between ranks.

    routing: "uniform"; "skewed", the n-th most popular expert chosen as 1/n, popularity in a
      random order of the experts; "one_rank", to the experts of rank 0 alone.
    capacity: "typical", rows that uniform routing seldom exceeds: 1.05 times the mean of live rows
      and half a block of padding an expert, or what fills the first block where the mean is
      smaller; "worst", the default, which nothing exceeds.
    num_sms: the bound of the kernels, None for their default.
    """

    tail: str = "zero"
    R: int = 2
    routing: str = "uniform"
    capacity: str = "typical"
    num_sms: int | None = None

    @property
    def num_local(self) -> int:
        return self.E // self.R

    @property
    def num_rows(self) -> int:
        return self.config().num_rows(self.R, self.T, self.K)

    def config(self, **options: Any) -> ep.EpConfig:
        rows = self._typical_rows() if self.capacity == "typical" else None
        if options.get("implementation") == "cuda":
            options = {"num_sms": self.num_sms, **options}
        return super().config(capacity=rows, **options)

    def _typical_rows(self) -> int:
        mean = self.T * self.K / self.num_local
        rows = TYPICAL_EXCESS * self.T * self.K + self.num_local * max(self.A / 2, self.A - mean)
        return math.ceil(rows / self.A) * self.A

    def ids(self, random: np.random.Generator) -> np.ndarray:
        """[R*T, K]: K different experts for each token, of a routing that drops nothing."""
        for _ in range(100):
            ids = self._draw(random)
            if load(self, ids).aligned_rows.max() <= self.num_rows:
                return ids
        raise ValueError(
            f"100 routings exceed the {self.num_rows} rows of {self}. Use capacity='worst'"
        )

    def _draw(self, random: np.random.Generator) -> np.ndarray:
        if self.routing == "uniform":
            return super().ids(random)
        if self.routing == "skewed":
            rank = random.permutation(self.E) + 1
            scores = -np.log(rank) + random.gumbel(size=(self.R * self.T, self.E))
        else:
            scores = random.random((self.R * self.T, self.E), np.float32)
            scores[:, self.num_local :] = -1
        return np.argpartition(-scores, self.K - 1, axis=1)[:, : self.K].astype(np.int32)


def group_sweep(num_ranks: int) -> list[GroupShape]:
    """The standard point between ranks, with one letter changed at a time, and short batches."""
    # Those of one size follow each other, as they share tokens and rows.
    changes: list[dict[str, Any]] = [
        {"capacity": "worst"},
        *[{"capacity": "worst", "routing": routing} for routing in ("skewed", "one_rank")],
        *[{"num_sms": n} for n in (24, 32, 64, 96)],
        *[{"T": t} for t in (16, 128, 1024, 8192, 16384)],
        *[{"K": k} for k in (1, 2)],
        *[{"H": h} for h in (2048, 4096)],
        *[{"A": a} for a in (1, 16)],
    ]
    return [*quick_points(num_ranks), *[GroupShape(R=num_ranks, **change) for change in changes]]


def quick_points(num_ranks: int) -> list[GroupShape]:
    """The standard point with both tails and with the default capacity, and a short batch."""
    changes: list[dict[str, Any]] = [
        {},
        {"tail": "undefined"},
        {"tail": "undefined", "capacity": "worst"},
        {"T": 128, "A": 1, "capacity": "worst"},
    ]
    return [GroupShape(R=num_ranks, **change) for change in changes]


@dataclasses.dataclass(frozen=True)
class Load:
    """What one routing means for the ranks.

    token_pairs: [R, R] tokens of a source rank (first) that have a row on another (second). Each
      goes there once, however many rows it has.
    live_rows, aligned_rows: [R].
    """

    token_pairs: np.ndarray
    live_rows: np.ndarray
    aligned_rows: np.ndarray


def load(shape: Shape, ids: np.ndarray) -> Load:
    num_local = shape.E // shape.R
    owners = (ids // num_local).reshape(shape.R, shape.T, shape.K)
    goes_to = np.stack([(owners == rank).any(-1) for rank in range(shape.R)], -1)
    counts = np.bincount(ids.reshape(-1), minlength=shape.E).reshape(shape.R, num_local)
    aligned = -(-counts // shape.A) * shape.A
    return Load(goes_to.sum(1), counts.sum(1), aligned.sum(1))


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The bytes of one op: `routed` [R, R] of the tokens of one rank that have a row on another, or
    on itself, and `local` [R] in each rank's memory."""

    routed: np.ndarray
    local: np.ndarray

    @property
    def remote(self) -> np.ndarray:
        """[R, R] of `routed`, what crosses between ranks: diagonal 0."""
        return self.routed * (1 - np.eye(len(self.routed), dtype=int))


def most_of_a_rank(pairs: np.ndarray) -> int:
    """Of bytes [R, R] from rank to rank, the most that one sends, or receives, in all."""
    return int(max(pairs.sum(0).max(), pairs.sum(1).max()))


def traffic(op: str, shape: GroupShape, ids: np.ndarray) -> Traffic:
    """bytes_moved on every rank, and what goes between ranks: each token once for each rank that
    has one of its rows; for combine the same number of partials, the other way."""
    routed = load(shape, ids)
    remote = routed.token_pairs * (1 - np.eye(shape.R, dtype=int))
    local = [
        bytes_moved(op, shape, *rows, shape.num_rows, own, sent)
        for rows, own, sent in zip(
            zip(routed.live_rows, routed.aligned_rows, strict=True),
            routed.token_pairs.diagonal(),
            remote.sum(1),
            strict=True,
        )
    ]
    pairs = routed.token_pairs.T if op == "combine" else routed.token_pairs
    return Traffic(pairs * shape.row_bytes, np.array(local))
