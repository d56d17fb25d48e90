"""The shapes of the benchmarks, and the bytes each op must move."""

import dataclasses

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

    def config(self, **options) -> ep.EpConfig:
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


def bytes_moved(op: str, shape: Shape, live_rows: int, aligned_rows: int, capacity: int) -> int:
    """What one rank must read and write; padding and a zero tail are written too."""
    written_rows = capacity if shape.tail == "zero" else aligned_rows
    tokens = shape.T
    return (
        shape.row_bytes
        * {
            "dispatch": tokens + written_rows,
            "combine": live_rows + tokens,
            "combine_backward": live_rows + tokens + written_rows,
        }[op]
    )
