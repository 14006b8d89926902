"""Where a task under way can be picked up again: one file, replaced in one step."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from perdure.engine.machine import Machine
from perdure.engine.state import State, Stateful, load_tree, restore, save_tree
from perdure.errors import RunError
from perdure.kept.store import FileStore, in_folder

EVERY_STEPS_SHARED = 20
"""With several processes, whether to save is agreed on only so often: asking costs a collective call."""


@dataclass
class Position:
    """How far a task has come.

    Args:
        phase: Number of the phase under way.
        step: Finished steps in it.
        inside: What the phase needs to go on.
        done: Names of the finished phases.
    """

    phase: int = 0
    step: int = 0
    inside: State = field(default_factory=dict)
    done: list[str] = field(default_factory=list)


class Checkpoint:
    """Saves and restores a method and the phase under way in ``folder``.

    Args:
        folder: The run's ``resume`` folder, or ``None`` to keep nothing.
        machine: Only its main process writes.
        save_seconds: Least time between two saves inside a phase.

    Attributes:
        file: The state file.
        scratch: Items of Generate phases that are only needed until the task is sealed.
    """

    def __init__(self, folder: Path | None, machine: Machine, save_seconds: float) -> None:
        self.folder, self.machine, self.save_seconds = folder, machine, save_seconds
        self.file = None if folder is None else folder / "state.safetensors"
        self.scratch = FileStore() if folder is None else FileStore(folder / "items", folder / "items.jsonl")
        self._last = time.monotonic()

    def due(self, done: int, stopping: bool) -> tuple[bool, bool]:
        """Whether to save after ``done`` steps, and whether to stop. The same answer in every process."""
        if self.machine.world > 1 and done % EVERY_STEPS_SHARED:
            return False, False
        late = self.folder is not None and time.monotonic() - self._last >= self.save_seconds
        return self.machine.any(late and self.machine.main), self.machine.any(stopping)

    def save(self, method: Stateful, task: int, position: Position) -> None:
        """Write everything needed to go on from ``position``."""
        if self.file is not None and self.machine.main:
            save_tree(
                self.file,
                {
                    "task": task,
                    "phase": position.phase,
                    "step": position.step,
                    "inside": position.inside,
                    "done": position.done,
                    "method": dict(method.state_dict()),
                    "files": method.files,
                },
            )
        self._last = time.monotonic()  # after the write: on a slow disk, saving must not take all of the time

    def load(self, method: Stateful, task: int) -> Position:
        """Restore the method; the start of the task if nothing usable was saved for it."""
        if self.file is None or not self.file.exists():
            return Position()
        tree = load_tree(self.file)
        try:
            if tree["task"] != task:  # left over from a task that was sealed just before a kill
                return Position()
            files = {name: tuple(map(in_folder, names)) for name, names in tree["files"].items()}
            position = Position(tree["phase"], tree["step"], tree["inside"], tree["done"])
            restore(method, tree["method"])
            self.scratch.check_noted()  # what finished phases made is read again, so it must be what they made
            method.store.check_noted()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(
                f"{self.file} is not a state that can be resumed: {error!r}", "delete it to start the task again"
            ) from error
        method.files = files
        return position

    def clear(self) -> None:
        """Forget the task under way: it is sealed."""
        self.machine.barrier()
        if self.folder is not None and self.machine.main:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.machine.barrier()
