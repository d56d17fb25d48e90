"""The run: train, evaluate, sample, and write down what happened."""

import dataclasses
import importlib.metadata
import json
import platform
import time
import zlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from moe_lm import data, plots
from moe_lm.checkpoint import Checkpoints, History
from moe_lm.config import ModelConfig, RunConfig, TrainConfig
from moe_lm.program import Program, State, make_mesh, make_program
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import jax_moe_ep as ep

NUM_EVALUATIONS = 10  # in the course of a run
NUM_LOADS = 100
NUM_HELD_OUT_BATCHES = 8
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclasses.dataclass
class Clock:
    """Seconds of the steps, apart from the first one, which compiles."""

    first: float | None = None
    seconds: float = 0.0
    steps: int = 0

    def add(self, seconds: float) -> None:
        if self.first is None:
            self.first = seconds
        else:
            self.seconds, self.steps = self.seconds + seconds, self.steps + 1

    @property
    def steps_per_s(self) -> float:
        return self.steps / self.seconds if self.steps else 0.0


class Evaluation:
    """The held-out loss, always on the same windows."""

    def __init__(self, program: Program, windows: np.ndarray, batch: int):
        self._program = program
        self._batches = [
            data.to_devices(part, program.windows)
            for part in np.split(windows, len(windows) // batch)
        ]

    def loss(self, params: Any, shuffle_key: jax.Array | None = None) -> float:
        losses = [
            float(self._program.evaluate(params, batch, shuffle_key)[0]) for batch in self._batches
        ]
        return sum(losses) / len(losses)


class Run:
    """Everything of one run that is made once."""

    def __init__(self, model: ModelConfig, train: TrainConfig, run: RunConfig, console: Console):
        self.model, self.train, self.run, self.console = model, train, run, console
        self.mesh = make_mesh(run.num_ep, run.num_dp)
        check(model, train, self.mesh)
        self.program = make_program(model, train, self.mesh)
        self.text = data.load_text(run.files)
        count = NUM_HELD_OUT_BATCHES * train.batch
        self.held_out = data.held_out_windows(self.text.held_out, model.seq, count)
        self.evaluation = Evaluation(self.program, self.held_out, train.batch)
        self.unigram_entropy = data.unigram_entropy(self.text.train, self.held_out)
        shared = {"text_crc32": zlib.crc32(self.text.train), "mesh": dict(self.mesh.shape)}
        shared |= dataclasses.asdict(model) | dataclasses.asdict(train)
        self.checkpoints = Checkpoints(run.out / "checkpoints", shared)
        self.clock = Clock()

    def start(self) -> tuple[State, History]:
        if self.run.resume:
            state, history = self.checkpoints.restore(self.program)
            self.console.print(f"resumed after step {len(history.losses)}")
            return state, history
        self.checkpoints.clear()
        state = self.program.init()
        return state, History(held_out=[(0, self.evaluation.loss(state.params))])

    def go(self) -> dict[str, Any] | None:
        """The summary; None when the run was stopped before its last step."""
        self.describe()
        state, history = self.start()
        state = self.steps(state, history)
        self.checkpoints.close()
        if len(history.losses) < self.train.steps:
            self.console.print(f"stopped after step {len(history.losses)}; --resume goes on")
            return None
        key = jax.random.key(self.train.seed)
        shuffled = self.evaluation.loss(state.params, key)
        self.sample(state, key)
        summary = self.summary(history, shuffled)
        if jax.process_index() != 0:
            return summary
        (self.run.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        plots.loss_curve(self.run.out / "loss.png", summary, history.held_out)
        plots.expert_load(self.run.out / "expert_load.png", history.loads)
        return summary

    def steps(self, state: State, history: History) -> State:
        """Trains to the last step, or to stop_at."""
        windows = data.TrainingWindows(
            self.text.train, self.model.seq, self.train.batch, self.train.seed, history.position
        )
        last = min(self.run.stop_at or self.train.steps, self.train.steps)
        with progress_bar(self.console) as progress:
            task = progress.add_task("", total=last, completed=len(history.losses), text="compile")
            while len(history.losses) < last:
                batch = data.to_devices(next(windows), self.program.windows)
                started = time.perf_counter()
                state, loss, routing = self.program.step(state, batch)
                loss, routing = jax.device_get((loss, routing))
                self.clock.add(time.perf_counter() - started)
                history.losses.append(float(loss))
                history.num_dropped += int(routing.num_dropped.sum())
                history.position = windows.position
                self.now_and_then(state, history, routing.expert_counts, last)
                progress.update(task, advance=1, text=self.rates(history))
        return state

    def now_and_then(
        self, state: State, history: History, expert_counts: np.ndarray, last: int
    ) -> None:
        """What does not happen in every step: loads, evaluation, checkpoint."""
        step, steps = len(history.losses), self.train.steps
        if step % max(1, steps // NUM_LOADS) == 0:
            history.loads.append((step, expert_counts.tolist()))
        if step % max(1, steps // NUM_EVALUATIONS) == 0 or step == steps:
            history.held_out.append((step, self.evaluation.loss(state.params)))
        if step == last or (self.run.save_every and step % self.run.save_every == 0):
            self.checkpoints.save(state, history)

    def rates(self, history: History) -> str:
        steps = self.clock.steps_per_s
        tokens = steps * self.train.batch * self.model.seq
        return f"loss {history.losses[-1]:.3f} · {steps:.1f} steps/s · {tokens:,.0f} tokens/s"

    def sample(self, state: State, key: jax.Array) -> None:
        """Prints how the model goes on with the first half of a held-out window."""
        num_prompt = self.model.seq // 2
        tokens = np.repeat(self.held_out[:1, :-1], self.mesh.size, axis=0)
        tokens = data.to_devices(tokens, self.program.windows)
        out = np.asarray(self.program.sample(state.params, tokens, num_prompt, key))[0]
        prompt, added = (
            bytes(part).decode(errors="replace") for part in (out[:num_prompt], out[num_prompt:])
        )
        self.console.rule("held-out prompt, then what the model makes of it")
        self.console.print(prompt, style="dim", markup=False, highlight=False, end="")
        self.console.print(added, markup=False, highlight=False)
        self.console.rule()

    def describe(self) -> None:
        text = self.text
        self.console.print(
            f"mesh {dict(self.mesh.shape)} of {self.mesh.devices.flat[0].device_kind} · "
            f"{len(text.train):,} bytes to train on, {len(text.held_out):,} held out · "
            f"unigram entropy {self.unigram_entropy:.3f} nats a byte",
            highlight=False,
        )

    def summary(self, history: History, shuffled: float) -> dict[str, Any]:
        steps_per_s = self.clock.steps_per_s
        return {
            "loss": history.losses,
            "held_out_loss_before": history.held_out[0][1],
            "held_out_loss": history.held_out[-1][1],
            "held_out_loss_shuffled_routing": shuffled,
            "unigram_entropy": self.unigram_entropy,
            "num_dropped": history.num_dropped,
            "train_bytes": len(self.text.train),
            "held_out_bytes": len(self.text.held_out),
            "steps_per_s": steps_per_s,
            "tokens_per_s": steps_per_s * self.train.batch * self.model.seq,
            "first_step_s": self.clock.first,
            "implementation": self.model.implementation,
            "mesh": dict(self.mesh.shape),
            "device": self.mesh.devices.flat[0].device_kind,
            "versions": versions(),
            "model": dataclasses.asdict(self.model),
            "train": dataclasses.asdict(self.train),
        }


def check(model: ModelConfig, train: TrainConfig, mesh: Mesh) -> None:
    """What the parts would report less clearly."""
    if train.batch % mesh.size:
        raise ValueError(f"--batch {train.batch} must be a multiple of the {mesh.size} devices")
    if model.experts % mesh.shape["expert"]:
        raise ValueError(
            f"--experts {model.experts} must be a multiple of ep={mesh.shape['expert']}"
        )
    if not 1 <= model.top_k <= model.experts:
        raise ValueError(f"--top-k {model.top_k} must be between 1 and --experts {model.experts}")
    if model.width % 32:
        raise ValueError(f"--width {model.width} must be a multiple of 32, the size of a head")


def progress_bar(console: Console) -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    return Progress(*columns, TimeElapsedColumn(), console=console)


def versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "jax_moe_ep": ep.__version__, **found}
