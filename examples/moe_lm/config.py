"""Every option of the example, in one place."""

import dataclasses
from pathlib import Path
from typing import Literal

Dtype = Literal["float32", "bfloat16"]
Implementation = Literal["auto", "cuda", "reference"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The transformer. Bytes are the vocabulary; every feed-forward layer is a MoE.

    Attributes:
      width: H, a multiple of 32, the size of an attention head.
      expert_width: the inner size of one expert; None for 2 * width.
      dtype: of activations and matmuls. Parameters, router and loss are float32.
    """

    layers: int = 8
    width: int = 512
    experts: int = 32
    top_k: int = 2
    seq: int = 512
    expert_width: int | None = None
    dtype: Dtype = "float32"
    implementation: Implementation = "auto"

    @property
    def inner(self) -> int:
        return self.expert_width or 2 * self.width


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to learn. A resumed run must have the same TrainConfig, ModelConfig, mesh and text."""

    steps: int = 2000
    batch: int = 64
    learning_rate: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    balance: float = 0.01
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Where the run reads, computes and writes.

    Attributes:
      files: the text; none for the standard library.
      num_ep, num_dp: the mesh; None for what suits the machine.
      save_every: steps between checkpoints; None for the end only.
      stop_at: a step after which to save and end, as if interrupted.
    """

    out: Path
    files: tuple[Path, ...] = ()
    num_ep: int | None = None
    num_dp: int | None = None
    save_every: int | None = None
    stop_at: int | None = None
    resume: bool = False


SMALL_MODEL = ModelConfig(layers=2, width=64, experts=8, top_k=2, seq=128)
SMALL_TRAIN = TrainConfig(steps=250, batch=8, learning_rate=5e-3)
