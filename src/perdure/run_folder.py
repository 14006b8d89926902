"""The folder of one run: its files, its lock, its sealed tasks."""

from __future__ import annotations

import logging
import platform
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from perdure.config.load import dump_recipe, parse_recipe, read_raw, same_experiment
from perdure.config.recipe import Recipe
from perdure.errors import DataError, PerdureError, RunError, UsageError
from perdure.files import TEMPORARY, write_json
from perdure.kept.ledger import DONE, LEDGER, read_ledger, sealed_folders, task_folder
from perdure.kept.manifest import check_files, list_files, read_manifest
from perdure.kept.store import STORE, FileStore
from perdure.streams.description import DescribedStream, read_stream, write_stream

LOCK: Final = ".lock"
STARTED: Final = frozenset({LOCK, "stream.json", "environment.json"})
"""Files that may exist before the recipe is written."""

BEGIN: Final = ("recipe.yaml", "stream.json", "environment.json")
"""Files that a run begins with."""
_log = logging.getLogger(__name__)

Origin = dict[str, str | None]
"""Source, hash and licence of the weights that a network starts from."""
ORIGIN: Final = frozenset({"source", "sha256", "licence"})
ENVIRONMENT: Final = frozenset(
    {"perdure", "python", "system", "torch", "torchvision", "timm", "accelerate", "gpu", "threads"}
)
"""Keys of ``environment.json`` besides the origin of the first weights."""


class RunFolder:
    """One experiment on disk. It is complete and can be resumed.

    Attributes:
        path: The folder.
        recipe_file: The resolved recipe.
        resume: State of the current task.
        store: Files that methods keep; its folder need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_file, self.resume = path / "recipe.yaml", path / "resume"
        self.store = FileStore(path / STORE, self.resume / "kept.jsonl")

    def recipe(self) -> Recipe:
        """Read the recipe. Raises RunError if it is damaged."""
        try:
            return parse_recipe(read_raw(str(self.recipe_file)), str(self.recipe_file))
        except UsageError as error:
            raise RunError(error.what, "the file was changed or is damaged: restore it, or start a new run") from error

    def stream(self) -> DescribedStream:
        """Read ``stream.json``. Raises DataError where it is damaged."""
        return read_stream(self.path / "stream.json")

    def sealed(self) -> list[Path]:
        """Folders of sealed tasks, in order, up to the first one that is not sealed.

        Raises:
            DataError: ``stream.json`` is damaged, or does not name a task that is sealed: an older model would be used.
        """
        names = [task.name for task in self.stream().tasks]
        known = {task_folder(self.path, *place).name for place in enumerate(names)}
        if lost := sorted({mark.parent.name for mark in self.path.glob(f"tasks/*/{DONE}")} - known):
            raise DataError(
                f"{self.path / 'tasks' / lost[0]} is the folder of a sealed task that stream.json does not name",
                "one of them was changed: restore it, or run `perdure audit` to see more",
            )
        return sealed_folders(self.path, names)

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
        """Lock the folder for writing.

        Raises:
            RunError: Another process has locked it, it cannot be written, or a link in it leads somewhere else.
        """
        # here, for whatever writes or deletes comes through here; a run that somebody else made may hold any link
        if link := next((path for path in self.path.rglob("*") if path.is_symlink()), None):
            raise RunError(
                f"{link} is a link: what is written or deleted there may be no part of the run",
                "put the files themselves in its place; working files may lie elsewhere: engine.working=DIR",
            )
        lock = FileLock(self.path / LOCK)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout as error:
            raise RunError(
                f"another command is working on the run folder {self.path}",
                "wait until it ends; a new run goes into another folder (--out)",
            ) from error
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be written: {error.strerror or error}",
                "check the permissions, or choose another folder with --out",
            ) from error
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def read_alone(self) -> Iterator[None]:
        """Tell of another command at work where reading the run fails: it found the folder half changed by that one.

        Raises:
            RunError: Something failed, and another process has locked the folder.
        """
        try:
            yield
        except PerdureError:
            if self.recipe_file.exists() and (self.path / LOCK).exists():
                with self.locked():
                    pass
            raise

    def check(self, recipe: Recipe, described: DescribedStream, resume: bool) -> DescribedStream:
        """Check that a run can start or continue in this folder; returns its stream from now on. Writes nothing.

        Raises:
            RunError: The folder contains a run and ``resume`` is false, a run of another recipe or one whose stream
                does not begin with the run's, or other files.
        """
        if self.recipe_file.exists():
            if not resume:
                raise RunError(
                    f"there is a run in {self.path} already",
                    "continue it with --resume, or choose another folder with --out",
                )
            if key := same_experiment(self.recipe(), recipe):
                raise RunError(
                    f"the run in {self.path} was made with another value of '{key}'",
                    "use the same recipe, or choose another folder with --out",
                )
            return self.stream().continued_by(described, len(self.sealed()))
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is not a folder", "choose another folder with --out")
        # recipe.yaml is written last. Without it, the STARTED files come from a start that was killed.
        inside = [p.name for p in self.path.iterdir()] if self.path.exists() else []
        if any(name not in STARTED and not name.startswith(TEMPORARY) for name in inside):
            raise RunError(f"{self.path} is not empty and not a run folder", "choose another folder with --out")
        return described

    def start(
        self,
        recipe: Recipe,
        described: DescribedStream,
        resume: bool,
        first_weights: dict[str, str | None] | None = None,
    ) -> None:
        """Start a new run in this folder, or continue the one in it. Raises RunError as :meth:`check` does."""
        described = self.check(recipe, described, resume)
        for part in self.path.rglob(f"{TEMPORARY}*"):  # of a process that was killed while it wrote
            part.unlink(missing_ok=True)
        if self.recipe_file.exists():
            self._complete_list()
            check_files(self.path)
            if self.stream() != described:  # it has grown; written last, so that a kill in between is found here again
                self.list_files((), dropped=BEGIN)  # for then they would not be what the list says
                dump_recipe(recipe, self.recipe_file)
                write_stream(self.path / "stream.json", described)
            listed = read_manifest(self.path) or {}
            self.list_files([place for place in BEGIN if place not in listed])
            return
        write_stream(self.path / "stream.json", described)
        # the recipe comes last: a folder without one is not a run yet, and may be started again
        write_json(self.path / "environment.json", {**environment(), "first_weights": first_weights})
        dump_recipe(recipe, self.recipe_file)
        self.list_files(BEGIN)

    def list_files(self, places: Iterable[str], sealed: Iterable[Path] = (), dropped: Iterable[str] = ()) -> None:
        """Take what has just been written into ``files.json``; says so where that ends a signature."""
        if list_files(self.path, places, sealed, dropped):
            _log.warning("%s was signed; it has changed now, so its signature was removed: sign it again", self.path)

    def _complete_list(self) -> None:
        """Bring ``files.json`` up to what a kill left: seal without entry, entries of a task that is done again."""
        listed = read_manifest(self.path)
        if listed is None:
            return  # a run of an earlier version; its tasks from here on are listed
        sealed = self.sealed()
        places = {folder: f"tasks/{folder.name}/" for folder in sealed}
        known = {kept["file"] for folder in sealed for entry in read_ledger(folder)["items"] for kept in entry["files"]}
        inside = tuple(places.values())
        lost = [p for p in listed if p.startswith(("tasks/", f"{STORE}/")) and not (p in known or p.startswith(inside))]
        missing = [folder for folder, place in places.items() if f"{place}{LEDGER}" not in listed]
        if missing or lost:
            self.list_files((), missing, lost)

    def withdraw(self) -> None:
        """Remove a run without saved state whose recipe or data proved unusable after :meth:`start`."""
        if not any((self.path / name).exists() for name in ("resume", "tasks", STORE)):
            shutil.rmtree(self.path, ignore_errors=True)

    def space_for(self, needed: int) -> None:
        """Raise RunError unless the disk has ``needed`` free bytes."""
        there = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
        free = shutil.disk_usage(there).free
        if free < needed:
            raise RunError(
                f"the run needs about {needed / 1e9:.1f} GB, the disk of {self.path} has {free / 1e9:.1f} GB free",
                "free some space, or choose another folder with --out",
            )


def environment() -> dict[str, str | int | None]:
    """Versions and kind of machine. Contains no host or user names."""
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
