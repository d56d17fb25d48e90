"""Two pictures of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("agg")  # files only, no display

import matplotlib.pyplot as plt


def loss_curve(path: Path, summary: dict[str, Any], held_out: Sequence[tuple[int, float]]) -> None:
    """Training and held-out loss over the steps, beside what needs no context and no router."""
    losses = np.array(summary["loss"])
    span = max(1, len(losses) // 30)
    smooth = np.convolve(losses, np.ones(span) / span, mode="valid")
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(np.arange(1, len(losses) + 1), losses, color="C0", alpha=0.25, linewidth=1)
    label = f"training, mean of {span} steps"
    axes.plot(np.arange(span, len(losses) + 1), smooth, color="C0", label=label)
    axes.plot(*zip(*held_out, strict=True), "o-", color="C1", markersize=4, label="held out")
    entropy, shuffled = summary["unigram_entropy"], summary["held_out_loss_shuffled_routing"]
    axes.axhline(entropy, color="0.4", linestyle="--", label=f"unigram entropy, {entropy:.2f}")
    axes.plot(len(losses), shuffled, "x", color="C3", label=f"routing shuffled, {shuffled:.2f}")
    axes.set(xlabel="step", ylabel="nats a byte", xlim=(0, len(losses) * 1.02), ylim=(0, None))
    axes.set_title(f"held-out loss {summary['held_out_loss']:.3f} nats a byte")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def expert_load(path: Path, loads: Sequence[tuple[int, list[list[int]]]]) -> None:
    """How many tokens each expert got in the course of training, 1 being the mean."""
    steps = [step for step, _ in loads]
    counts = np.array([counts for _, counts in loads], float)  # [steps, layers, E]
    load = counts / counts.mean(-1, keepdims=True)
    num_layers, num_experts = load.shape[1:]
    columns = min(num_layers, 4)
    rows = -(-num_layers // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(1 + 3.5 * columns, 0.5 + 2.8 * rows),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    extent = (0, steps[-1], num_experts - 0.5, -0.5)
    image = None
    for layer, axes in enumerate(grid.flat[:num_layers]):
        image = axes.imshow(
            load[:, layer].T,
            aspect="auto",
            interpolation="nearest",
            extent=extent,
            cmap="RdBu_r",
            vmin=0,
            vmax=2,
        )
        axes.set_title(f"layer {layer}")
        axes.yaxis.get_major_locator().set_params(integer=True)
    for axes in grid.flat[num_layers:]:
        axes.set_visible(False)
    figure.supxlabel("step", fontsize="medium")
    figure.supylabel("expert", fontsize="medium")
    figure.colorbar(image, ax=grid, label="tokens / mean", extend="max")
    figure.savefig(path, dpi=120)
    plt.close(figure)
