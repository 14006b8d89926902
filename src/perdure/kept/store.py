"""Files that a method keeps: written once into the run's folder ``kept``, never changed, named by later ledgers.

One folder for the whole run, so that no task copies what an earlier one made.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator
from typing_extensions import TypedDict  # pydantic needs this one up to Python 3.11

from perdure.errors import DataError, RunError
from perdure.files import sha256, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

STORE = "kept"
"""The store's folder in a run."""


def in_folder(name: str) -> str:
    """Return a relative path that stays in its folder; else ValueError. Names come from files that anybody can edit."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"'{name}' points out of its folder")
    return name


Place = Annotated[str, AfterValidator(in_folder)]


class StoredFile(TypedDict):
    """A file as a ledger lists it: place in the run folder, size in bytes, hex SHA-256."""

    file: Place
    bytes: int
    sha256: str


def item_names(task: int, number: int, phase: str, count: int) -> tuple[str, ...]:
    """Names of the items of a task's ``number``-th phase: ``TT-NN-phase/000123.safetensors``."""
    folder = f"{task:02d}-{number:02d}-{phase.replace('/', '-').replace(' ', '-')}"
    return tuple(f"{folder}/{index:06d}.safetensors" for index in range(count))


class FileStore:
    """Immutable files by name.

    Args:
        root: Its folder, which need not exist; ``None`` for a store that can hold nothing.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root
        self._hashed: dict[str, StoredFile] = {}

    def path(self, name: str) -> Path:
        """Where a file is.

        Raises:
            RunError: The store has no folder.
        """
        if self.root is None:
            raise RunError("a phase that generates items needs a run folder")
        return self.root / name

    def paths(self, names: Iterable[str]) -> list[Path]:
        """Where files are, in order."""
        return [self.path(name) for name in names]

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a file in one step, and compute its hash."""
        write_tensors(self.path(name), tensors)
        self.describe(name)  # now, while the file is in the page cache

    def describe(self, name: str) -> StoredFile:
        """Size and hash of a file; read at most once by each process, as files do not change."""
        if name not in self._hashed:
            path = self.path(name)
            if not path.is_file():
                raise DataError(f"{path} does not exist, but the method keeps it", "restore the file")
            self._hashed[name] = {"file": f"{STORE}/{name}", "bytes": path.stat().st_size, "sha256": sha256(path)}
        return self._hashed[name]

    def sweep(self, task: int, kept: Collection[str]) -> None:
        """Delete what phases of a task wrote and the method did not keep up to the task's end."""
        if self.root is None:
            return
        wanted = {self.path(name) for name in kept}
        for folder in self.root.glob(f"{task:02d}-*"):
            if folder.is_symlink():  # never followed: what it points to is not the run's
                folder.unlink()
                continue
            for path in folder.iterdir():
                if path not in wanted:
                    path.unlink()
            if not any(folder.iterdir()):
                folder.rmdir()
