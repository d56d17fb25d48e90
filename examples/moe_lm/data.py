"""Bytes to learn from: which files, what is held out, and how windows reach the devices."""

import dataclasses
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding

MAX_BYTES = 16 * 2**20
BLOCK_BYTES = 8192  # the unit of the split: larger than any window, small beside the text
HELD_OUT_EVERY = 10  # one block in ten is held out
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib"}


@dataclasses.dataclass(frozen=True)
class Text:
    """Bytes (uint8) to train on, and bytes that are never trained on."""

    train: np.ndarray
    held_out: np.ndarray


def standard_library() -> list[Path]:
    """The .py files of this Python's standard library, without its tests, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    return [root / path for path in sorted(paths) if not NOT_THE_LIBRARY & set(path.parts)]


def load_text(files: Sequence[Path] = ()) -> Text:
    """The first MAX_BYTES of the files, one block in ten held out.

    What remains for training is joined again: one window in a few hundred has a seam in it.
    """
    parts, size = [], 0
    for path in files or standard_library():
        part = np.frombuffer(path.read_bytes()[: MAX_BYTES - size], np.uint8)
        parts.append(part)
        size += len(part)
        if size >= MAX_BYTES:
            break
    num_blocks = size // BLOCK_BYTES
    if num_blocks < HELD_OUT_EVERY:
        raise ValueError(
            f"the text has {size} bytes, but {HELD_OUT_EVERY * BLOCK_BYTES} are needed so that "
            "some can be held out. Give more files"
        )
    blocks = np.concatenate(parts)[: num_blocks * BLOCK_BYTES].reshape(num_blocks, BLOCK_BYTES)
    is_held_out = np.arange(num_blocks) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    return Text(train=blocks[~is_held_out].reshape(-1), held_out=blocks[is_held_out].reshape(-1))


def unigram_entropy(train: np.ndarray, windows: np.ndarray) -> float:
    """Nats a byte that the byte frequencies of `train` (add one) need for the windows' targets.

    It is the held-out loss of a model that knows how often each byte comes and nothing else.
    """
    counts = np.bincount(train, minlength=256) + 1
    return float(-np.log(counts / counts.sum())[windows[:, 1:]].mean())


def held_out_windows(held_out: np.ndarray, seq: int, num_windows: int) -> np.ndarray:
    """num_windows windows of seq + 1 bytes, evenly spread over the held-out bytes."""
    starts = np.linspace(0, len(held_out) - seq - 1, num_windows).astype(int)
    return np.stack([held_out[start : start + seq + 1] for start in starts])


class TrainingWindows:
    """Batches [B, S + 1] in an order that depends on seed and position only, epoch after epoch.

    The windows overlap by one byte, the last target of one being the first input of the next.
    `position` counts the batches given: make another one with it and it goes on from there.
    """

    def __init__(self, text: np.ndarray, seq: int, batch: int, seed: int, position: int = 0):
        self.position = position
        self._text, self._seq, self._batch, self._seed = text, seq, batch, seed
        self._num_windows = (len(text) - 1) // seq
        if self._num_windows < batch:
            raise ValueError(
                f"the training text has {self._num_windows} windows of {seq} bytes, fewer than a "
                f"batch of {batch}. Give more files, or lower --batch or --seq"
            )
        self._epoch, self._order = -1, np.empty(0, int)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        epoch, index = divmod(self.position, self._num_windows // self._batch)
        if epoch != self._epoch:
            rng = np.random.default_rng((self._seed, epoch))
            self._epoch, self._order = epoch, rng.permutation(self._num_windows)
        self.position += 1
        starts = self._order[index * self._batch : (index + 1) * self._batch] * self._seq
        return self._text[starts[:, None] + np.arange(self._seq + 1)]


def to_devices(windows: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Host bytes as one global array: the only place where data crosses to the devices.

    Every process knows all windows of a batch and copies those of its own devices, so one
    process for all devices and one process a device are the same program.
    """
    return jax.make_array_from_callback(windows.shape, sharding, lambda index: windows[index])
