"""A task that is not sealed yet: the files and folders that a run may hold for it before a ledger lists them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from perdure.audit.formats import png_problem, read_safetensors
from perdure.audit.ledgers import SAMPLE
from perdure.files import TEMPORARY
from perdure.kept.ledger import LEDGER, task_folder
from perdure.kept.manifest import ELSEWHERE, WORKING
from perdure.kept.store import STORE

RESUME: Final = "resume"
_TASK_FILE: Final = re.compile(
    rf"(weights\.safetensors|counts\.json|cases\.csv|changes\.json|numbers\.json|{LEDGER}|kept/[^/]+\.safetensors|{SAMPLE.pattern})"
)
_WORKING_FILE: Final = re.compile(r"([\w.-]+/){1,3}[\w.-]+")
_RESUME_FILE: Final = re.compile(
    rf"{RESUME}/(state\.safetensors|(items|kept)\.jsonl|items/[\w.-]+/\d{{6}}\.safetensors)"
)


@dataclass(frozen=True)
class UnderWay:
    """The task that is under way or to come.

    Attributes:
        number: Its number, from 0 on.
        folder: Name of its folder in ``tasks/``.
    """

    number: int
    folder: str

    @classmethod
    def after(cls, run: Path, sealed: int, names: Sequence[str]) -> UnderWay | None:
        """The task after the sealed ones, given the names of all tasks; ``None`` in a finished run."""
        return cls(sealed, task_folder(run, sealed, names[sealed]).name) if sealed < len(names) else None

    def may_hold(self, place: str) -> bool:
        """Whether a file may be there: of the task's folder, its state, and what a kill left."""
        if PurePosixPath(place).name.startswith(TEMPORARY):
            return True
        inside = place.removeprefix(f"tasks/{self.folder}/")
        if inside != place:
            return _TASK_FILE.fullmatch(inside) is not None
        if self.is_working(place):
            return _WORKING_FILE.fullmatch(place.removeprefix(f"{WORKING}/")) is not None
        kept = re.fullmatch(rf"{STORE}/{self.number:02d}-\d\d-[^/]+/\d{{6}}\.safetensors", place)
        return kept is not None or _RESUME_FILE.fullmatch(place) is not None

    def is_working(self, place: str) -> bool:
        """Whether a file is one of the task's working files, which hold images."""
        return place.startswith(f"{WORKING}/{self.folder}/")

    def may_hold_folder(self, place: str) -> bool:
        """Whether a folder may be there."""
        mine = f"tasks/{self.folder}"
        if place == WORKING or f"{place}/".startswith(f"{WORKING}/{self.folder}/"):
            return True
        if place in (RESUME, f"{RESUME}/items", mine, f"{mine}/kept", f"{mine}/samples"):
            return True
        return bool(re.fullmatch(rf"({STORE}|{RESUME}/items)/{self.number:02d}-\d\d-[^/]+", place))


def form_problem(path: Path) -> str | None:
    """A file of a task under way has the form that its name says; what its tensors hold nobody has listed yet."""
    if path.name.startswith(TEMPORARY):
        return None
    if path.name == ELSEWHERE:
        return "is not empty" if path.stat().st_size else None
    if path.suffix == ".png":
        return png_problem(path.read_bytes())
    if path.suffix == ".safetensors":
        wrong = read_safetensors(path)[1]
        return None if path.parent.name == RESUME and wrong == "holds metadata besides its tensors" else wrong
    return None
