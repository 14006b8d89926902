"""The folder of one run: what is in it, who may write to it, which tasks are sealed."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from perdure.config.load import dump_recipe, parse_recipe, read_raw, same_experiment
from perdure.config.recipe import Recipe
from perdure.errors import RunError, UsageError
from perdure.files import TEMPORARY, read_json, write_json
from perdure.kept.ledger import sealed_folders, task_folder
from perdure.kept.store import STORE, FileStore

STARTED: Final = frozenset({".lock", "stream.json", "environment.json"})
"""Files that may be there before the recipe is."""


class RunFolder:
    """One experiment on disk, complete and resumable."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def resume(self) -> Path:
        """State of the task under way."""
        return self.path / "resume"

    @property
    def store(self) -> FileStore:
        """Files that methods keep; need not exist."""
        return FileStore(self.path / STORE)

    def recipe(self) -> Recipe:
        """Read the recipe back. Raises RunError where it is damaged."""
        try:
            return parse_recipe(read_raw(str(self.recipe_file)), str(self.recipe_file))
        except UsageError as error:
            raise RunError(error.what, "the file was changed or is damaged") from error

    def stream(self) -> dict[str, Any]:
        """Description of the stream (``stream.json``)."""
        described: dict[str, Any] = read_json(self.path / "stream.json")
        return described

    def task_folder(self, index: int, name: str) -> Path:
        """Folder of a task, ``tasks/00-NAME``."""
        return task_folder(self.path, index, name)

    def sealed(self) -> list[Path]:
        """Folders of sealed tasks, in order, up to the first one that is not sealed."""
        return sealed_folders(self.path, [task["name"] for task in self.stream()["tasks"]])

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """Open a folder that a run wrote. Raises RunError otherwise."""
        run = cls(path)
        if not run.recipe_file.is_file() or not (path / "stream.json").is_file():
            raise RunError(
                f"{path} is not a run folder", "give the folder that `perdure run` wrote (it holds recipe.yaml)"
            )
        return run

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for writing. Raises RunError if another run holds it."""
        lock = FileLock(self.path / ".lock")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout as error:
            raise RunError(
                f"another run is writing to {self.path}", "wait for it, or choose another folder with --out"
            ) from error
        except OSError as error:
            raise RunError(f"{self.path} cannot be written: {error.strerror or error}") from error
        try:
            yield
        finally:
            lock.release()

    def check(self, recipe: Recipe, described: dict[str, Any], resume: bool) -> None:
        """Look whether a run can begin here or go on; writes nothing.

        Raises:
            RunError: A run is here and ``resume`` was not asked for, or it was made by another recipe; or the
                folder holds something else.
        """
        if self.recipe_file.exists():
            if not resume:
                raise RunError(
                    f"there is a run in {self.path} already", "go on with --resume, or choose another folder with --out"
                )
            if key := same_experiment(self.recipe(), recipe):
                raise RunError(
                    f"the run in {self.path} was made with another value of '{key}'",
                    "use the same recipe, or another --out",
                )
            if self.stream() != described:
                raise RunError(
                    f"the data of the run in {self.path} has changed: its tasks are not the same any more",
                    "bring the data back as it was, or choose another folder with --out",
                )
            return
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is not a folder", "choose another one with --out")
        # recipe.yaml is written last: where it is missing, the rest is what a start that was killed left behind
        inside = [p.name for p in self.path.iterdir()] if self.path.exists() else []
        if any(name not in STARTED and not name.startswith(TEMPORARY) for name in inside):
            raise RunError(f"{self.path} is not empty and not a run folder", "choose another folder with --out")

    def start(
        self, recipe: Recipe, described: dict[str, Any], resume: bool, first_weights: dict[str, Any] | None = None
    ) -> None:
        """Begin a new run here or go on with the one that is here. Raises RunError as :meth:`check` does.

        ``first_weights`` says what the network started from: source, hash, licence.
        """
        self.check(recipe, described, resume)
        self._sweep()
        if not self.recipe_file.exists():
            write_json(self.path / "stream.json", described)
            write_json(self.path / "environment.json", {**environment(), "first_weights": first_weights})
            dump_recipe(recipe, self.recipe_file)

    def withdraw(self) -> None:
        """Remove a run of which nothing has been saved yet: its recipe or its data turned out to be wrong."""
        if not any((self.path / name).exists() for name in ("resume", "tasks", STORE)):
            shutil.rmtree(self.path, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what a killed process left half-written."""
        for part in self.path.rglob(f"{TEMPORARY}*"):
            part.unlink(missing_ok=True)

    def space_for(self, needed: int) -> None:
        """Raise RunError unless the disk has ``needed`` free bytes."""
        there = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
        free = shutil.disk_usage(there).free
        if free < needed:
            raise RunError(
                f"the run needs about {needed / 1e9:.1f} GB, the disk of {self.path} has {free / 1e9:.1f} GB free",
                "free some space or choose another --out",
            )


def environment() -> dict[str, Any]:
    """Versions and kind of machine; no names of hosts or users."""
    import accelerate
    import timm
    import torch
    import torchvision

    from perdure import __version__

    return {
        "perdure": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
    }
