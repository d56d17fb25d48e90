"""What a run needs to go on exactly where it stopped, kept with orbax."""

import dataclasses
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from moe_lm.program import Program, State


@dataclasses.dataclass
class History:
    """The host's side of a run, as plain numbers.

    Attributes:
      losses: training loss of every step.
      held_out: (step, held-out loss) pairs; step 0 is before training.
      loads: (step, tokens of every expert [layers][E] in that step's batch) pairs.
      num_dropped: assignments dropped since the start.
      position: batches taken from the training windows.
    """

    losses: list[float] = dataclasses.field(default_factory=list)
    held_out: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    loads: list[tuple[int, list[list[int]]]] = dataclasses.field(default_factory=list)
    num_dropped: int = 0
    position: int = 0


class Checkpoints:
    """The checkpoints of one run: the newest two, and what the run was configured as."""

    def __init__(self, folder: Path, run: dict[str, Any]):
        self._run = run
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            # The step donates the state, so it is written before training goes on.
            options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False),
        )

    def clear(self) -> None:
        """Makes room for a run from the start; an unfinished one is never thrown away."""
        step = self._manager.latest_step()
        if step is None:
            return
        if step < self._restore_host(step)["run"]["steps"]:
            raise FileExistsError(
                f"{self._manager.directory} has an unfinished run, at step {step}. Give --resume "
                "to go on with it, or another --out"
            )
        for step in self._manager.all_steps():
            self._manager.delete(step)

    def save(self, state: State, history: History) -> None:
        host = {"run": self._run, "history": dataclasses.asdict(history)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host))
        self._manager.save(len(history.losses), args=items)

    def restore(self, program: Program) -> tuple[State, History]:
        """The newest checkpoint, on the devices of the program."""
        step = self._manager.latest_step()
        if step is None:
            raise FileNotFoundError(f"no checkpoint to resume from in {self._manager.directory}")
        host = self._restore_host(step)
        saved = host["run"]
        if different := {key for key in self._run if saved.get(key) != self._run[key]}:
            raise ValueError(
                "a run resumes with the options it was started with; these differ: "
                + ", ".join(f"{k} {saved.get(k)} -> {self._run[k]}" for k in sorted(different))
            )
        target = ocp.args.StandardRestore(program.abstract_state)
        restored = self._manager.restore(step, args=ocp.args.Composite(state=target))
        return restored.state, History(**host["history"])

    def _restore_host(self, step: int) -> dict[str, Any]:
        items = ocp.args.Composite(host=ocp.args.JsonRestore())
        return self._manager.restore(step, args=items).host

    def close(self) -> None:
        self._manager.close()
