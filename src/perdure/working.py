"""Working files of a task: arrays made from its images for training, and gone when it is sealed.

They hold images, of patients too. So they lie in one place, which the user may choose, and nowhere else.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from perdure.data.dataset import members
from perdure.engine.machine import Machine
from perdure.errors import RunError
from perdure.files import write_atomic
from perdure.kept.ledger import task_folder
from perdure.kept.manifest import ELSEWHERE, WORKING
from perdure.streams.task import Task


class WorkingFolder:
    """The place of a run's working files.

    Args:
        run: The run folder.
        chosen: A folder that the user names instead; the run has a folder of its own in it, whose name tells nothing.
    """

    def __init__(self, run: Path, chosen: Path | None) -> None:
        inside = f"perdure-{hashlib.blake2b(str(run.resolve()).encode(), digest_size=6).hexdigest()}"
        self.path = run / WORKING if chosen is None else chosen / inside
        self.mark = None if chosen is None else run / WORKING

    def begin(self, task: Task, machine: Machine) -> None:
        """Leave a mark in the run where working files will lie elsewhere: an audit sees that there are some.

        It comes first, so that no kill leaves images in a folder that nothing tells of.
        """
        if self.mark is not None and machine.main:
            write_atomic(self.mark / self.of(task).name / ELSEWHERE, lambda part: part.write_bytes(b""))

    def fill(self, task: Task, machine: Machine, quiet: bool) -> None:
        """Write what the task's training reads, unless it is there; with a progress bar.

        Raises:
            DataError: A case is damaged.
            RunError: The place cannot be written, or the disk is full.
        """
        if task.data is None or task.data.prepare is None:
            return
        console = Console(stderr=True, quiet=quiet or not machine.main)
        with Progress(console=console, transient=True, disable=console.quiet or not console.is_terminal) as bar:
            total = sum(map(len, members(task.data.train())))
            shown = bar.add_task("preparing cases", total=total)
            for mine in (machine.main, not machine.main):  # the main process writes, the others find it done
                if mine:
                    task.data.prepare(self.of(task), lambda: bar.advance(shown))
                machine.barrier()

    def clear(self, besides: Sequence[Task] = ()) -> None:
        """Delete the working files of all tasks but those of ``besides``.

        Raises:
            RunError: That fails; or there are some in a folder that the recipe does not name any more.
        """
        if self.mark is None and any(self.path.glob(f"*/{ELSEWHERE}")):
            raise RunError(
                "working files of this run, which hold images, lie in a folder that engine.working named",
                "give engine.working=DIR again: they are needed to go on, and deleted afterwards",
            )
        for place in filter(None, (self.path, self.mark)):
            self._clear(place, besides)

    def _clear(self, place: Path, besides: Sequence[Task]) -> None:
        if not place.is_dir():
            return
        kept = {self.of(task).name for task in besides}
        try:
            for folder in place.iterdir():
                if folder.name not in kept:
                    shutil.rmtree(folder)
            if not any(place.iterdir()):
                place.rmdir()
        except OSError as error:
            raise RunError(
                f"the working files in {place} cannot be deleted: {error.strerror or error}",
                "they hold images: delete the folder by hand",
            ) from error

    def of(self, task: Task) -> Path:
        """Folder of one task's working files."""
        return self.path / task_folder(Path(), task.index, task.name).name
