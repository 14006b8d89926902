"""Files that a method keeps: written once into the run's folder ``kept``, never changed, named by later ledgers.

One folder for the whole run, so that no task copies what an earlier one made.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, Field
from typing_extensions import TypedDict  # pydantic needs this one up to Python 3.11

from perdure.errors import DataError, RunError
from perdure.files import sha256, write_failure, write_tensors

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
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""Hex SHA-256: any other text in its place can hold something."""
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
"""An integer of 64 bits: one of thousands of digits can hold a picture."""


class StoredFile(TypedDict):
    """A file as a ledger lists it: place in the run folder, size in bytes, hex SHA-256."""

    file: Place
    bytes: Count
    sha256: Digest


def item_names(task: int, number: int, phase: str, count: int) -> tuple[str, ...]:
    """Names of the items of a task's ``number``-th phase: ``TT-NN-phase/000123.safetensors``."""
    folder = f"{task:02d}-{number:02d}-{phase.replace('/', '-').replace(' ', '-')}"
    return tuple(f"{folder}/{index:06d}.safetensors" for index in range(count))


def drop_items(root: Path, task: int) -> None:
    """Delete the items of a task and of all later ones from the store's folder, if there is one."""
    for folder in root.iterdir() if root.is_dir() and not root.is_symlink() else ():
        number = folder.name.partition("-")[0]
        if number.isdecimal() and int(number) >= task and not folder.is_symlink():
            shutil.rmtree(folder)


class FileStore:
    """Immutable files by name.

    Args:
        root: Its folder, which need not exist; ``None`` for a store that can hold nothing.
        journal: Where the hash of each file is noted when it is written, so that a resumed run trusts no other file.
            Without it, none that is there already is trusted.
    """

    def __init__(self, root: Path | None = None, journal: Path | None = None) -> None:
        self.root, self.journal = root, journal
        self._hashed: dict[str, StoredFile] = {}
        self._before: dict[str, str] | None = None  # what earlier processes noted

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
        self._hashed.pop(name, None)
        write_tensors(self.path(name), tensors)
        made = self.describe(name)  # now, while the file is in the page cache
        if self.journal is not None:
            line = json.dumps({"name": name, "sha256": made["sha256"]}) + "\n"
            try:
                self.journal.parent.mkdir(parents=True, exist_ok=True)
                with self.journal.open("a", encoding="utf-8") as stream:  # one short line: whole for other processes
                    stream.write(line)
            except OSError as error:
                raise write_failure(self.journal, error) from error

    def whole(self, name: str) -> bool:
        """Whether a file was written by this process, or by an earlier one that noted its hash, and is unchanged.

        Raises:
            DataError: The file is not the one that was noted.
        """
        if not self.path(name).is_file():
            return False
        if name not in self._hashed and name in self._noted:
            self._compare(name, self._noted[name])
        return name in self._hashed

    def check_noted(self) -> None:
        """Hash every file that earlier processes noted. Raises DataError where one is not as it was written."""
        for name, expected in self._noted.items():
            if name not in self._hashed and self.path(name).is_file():
                self._compare(name, expected)

    def _compare(self, name: str, expected: str) -> None:
        if self.describe(name)["sha256"] != expected:
            del self._hashed[name]
            raise DataError(
                f"{self.path(name)} is not as the run wrote it (hash differs)",
                "restore the file, or delete it and the folder 'resume' to do the task again",
            )

    @property
    def _noted(self) -> dict[str, str]:
        """Hashes by name, read once; a line that a kill cut short counts as not written, the last of a name holds."""
        if self._before is not None:
            return self._before
        self._before = noted = dict[str, str]()
        if self.journal is not None and self.journal.is_file():
            for line in self.journal.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    noted[in_folder(str(entry["name"]))] = str(entry["sha256"])
        return noted

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
        with suppress(OSError):  # not empty, or never made
            self.root.rmdir()
