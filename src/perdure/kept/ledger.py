"""The ledger: every byte that a sealed task keeps, what kind it is, what it was made from and where it is.

Places are given from the run folder on, so a ledger may name files of earlier tasks and of the run's store
(:mod:`perdure.kept.store`). Who writes the files: :mod:`perdure.kept.method_state`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic needs this one up to Python 3.11

from perdure.errors import DataError, NewerVersionError
from perdure.files import read_json, sha256, write_json
from perdure.kept.store import STORE, Count, Digest, Place, StoredFile

LEDGER: Final = "ledger.json"
DONE: Final = "done"
VERSION: Final = 3
"""Of ledgers. Version 2 had neither ``patients``, ``min_images`` nor ``from_images``, and no manifest beside it."""
MIN_IMAGES: Final = 20
PICTURE_SIDE: Final = 8
"""From this height and width on, a statistic is taken for a picture: smaller ones are matrices of a few channels."""
_OF_SAMPLE: Final = re.compile(r"one (test|validation) image, shown in the report")
_OF_SLICE: Final = re.compile(r"-(mid|worst-s\d+)$")
AVERAGED: Final = ("statistics", "prototypes", "preview")
"""Kinds whose tensors have to come from enough images where they look like images."""
MOST_WORDS: Final = 500
"""Characters of what an item says that it was made from."""
LONGEST_NAME: Final = 120
"""Characters of an item's name."""
_DAMAGED: Final = "the file was changed or is damaged"


class StoredTensor(TypedDict):
    """A tensor as a ledger lists it; ``sha256`` is that of its bytes, ``file`` the one that holds it."""

    name: str
    shape: list[Count]
    dtype: str
    sha256: Digest
    file: Place


class Entry(TypedDict):
    """One kept item.

    ``bytes`` counts the tensors and the stored files that are needed after the task, not what earlier files hold
    besides. ``files`` are all files that it needs; ``stored`` is the name in the method's ``files`` of those in the
    store. ``from_images``: see :class:`~perdure.kept.items.Kept`; over all classes so far.
    """

    name: str
    kind: str
    bytes: Count
    made_from: str
    patient_data: bool
    per_class_bytes: Count | None
    shows: str | None
    stored: str | None
    files: list[StoredFile]
    tensors: list[StoredTensor]
    from_images: Count | None


class Ledger(TypedDict):
    """What ``ledger.json`` holds; ``total_bytes`` are those needed after the task, by kind.

    ``patients`` says whether the images come from patients, ``min_images`` from how many of them a statistic that looks
    like an image has to come then.
    """

    version: int
    task: str
    patients: bool
    min_images: Count
    items: list[Entry]
    total_bytes: dict[str, Count]


_ADAPTER: Final = TypeAdapter(Ledger)


def task_folder(run: Path, index: int, name: str) -> Path:
    """Folder of a task, ``tasks/00-NAME``."""
    return run / "tasks" / f"{index:02d}-{name.replace('/', '-').replace(' ', '-')}"


def sealed_folders(run: Path, names: Sequence[str]) -> list[Path]:
    """Folders of sealed tasks, given the names of all tasks, up to the first one that is not sealed."""
    folders: list[Path] = []
    for index, name in enumerate(names):
        folder = task_folder(run, index, name)
        if not (folder / DONE).is_file():
            break
        folders.append(folder)
    return folders


def is_picture(shape: Sequence[int]) -> bool:
    """Whether a statistic of this shape looks like images: channels, height and width, perhaps for each class."""
    return len(shape) >= 3 and min(shape[-2:]) >= PICTURE_SIDE


def is_raw(entry: Entry) -> bool:
    """Whether a ledger entry holds images as they were read, whatever its mark ``patient_data`` says.

    Exemplars are, and previews, which are pictures of test images; except that a preview among the method's own
    tensors (``tasks/TASK/kept/NAME.safetensors`` and the run's store, which only the method's state gets into) shows
    what the method made up.
    """
    if entry["kind"] == "preview":
        places = [PurePosixPath(file["file"]) for file in entry["files"]]
        return not all(
            p.suffix == ".safetensors" and (p.parts[0] == STORE or p.parts[2:-1] == ("kept",)) for p in places
        )
    return entry["kind"] == "exemplars"


def shows_few(entry: Entry, min_images: int) -> bool:
    """Whether an item holds statistics that look like images and come from fewer than ``min_images`` images."""
    if entry["kind"] not in AVERAGED:
        return False
    if entry["shows"] != "images" and not any(is_picture(tensor["shape"]) for tensor in entry["tensors"]):
        return False
    return entry["from_images"] is None or entry["from_images"] < min_images


def preview_entry(folder: Path, file: Path, patients: bool, split: str = "test") -> Entry:
    """Ledger entry of a sample picture of what is measured: a ``test`` or a ``validation`` image."""
    return {
        "name": file.stem,
        "kind": "preview",
        "bytes": file.stat().st_size,
        "made_from": f"one {split} image, shown in the report",
        "patient_data": patients,
        "per_class_bytes": None,
        "shows": None,
        "stored": None,
        "files": [describe(folder, file)],
        "tensors": [],
        "from_images": None,
    }


def sample_pictures(names: Iterable[str], made_from: str) -> str:
    """In words, what :func:`preview_entry` lists under these names: "6 test images, four pictures each".

    Args:
        names: Names of the entries of any number of tasks.
        made_from: Their common origin.

    Returns:
        ``""`` where the origin is another one.
    """
    match = _OF_SAMPLE.fullmatch(made_from)
    if match is None:
        return ""
    # a sample's files are NAME.image, NAME.truth, NAME.pred and NAME.error, or NAME.image and NAME.class
    parts: dict[str, set[str]] = {}
    for name in names:
        sample, _, part = name.rpartition(".")
        cut = _OF_SLICE.search(sample)  # of a volume there are such files of each slice that is shown
        parts.setdefault(sample[: cut.start()] if cut else sample, set()).add(f"{cut[0] if cut else ''}.{part}")
    images = f"{len(parts)} {match[1]} image{'' if len(parts) == 1 else 's'}"
    numbers = {len(found) for found in parts.values()}
    if any(".class" in found for found in parts.values()):
        return f"{images}, each with the class that the model says"
    if len(numbers) > 1:
        return f"{images}, {min(numbers)} to {max(numbers)} pictures each"
    (each,) = numbers
    number = {1: "one", 2: "two", 3: "three", 4: "four", 8: "eight"}.get(each, str(each))
    return f"{images}, {number} picture{'' if each == 1 else 's'}{' each' if len(parts) > 1 else ''}"


def write_ledger(
    folder: Path, task: str, entries: Sequence[Entry], patients: bool, min_images: int = MIN_IMAGES
) -> None:
    """Write ``ledger.json``; raw samples of patient data sets are marked as patient data."""
    totals: Counter[str] = Counter()
    for entry in entries:
        entry["patient_data"] |= patients and entry["kind"] == "exemplars"
        totals[entry["kind"]] += entry["bytes"]
    ledger: Ledger = {
        "version": VERSION,
        "task": task,
        "patients": patients,
        "min_images": min_images,
        "items": list(entries),
        "total_bytes": dict(totals),
    }
    write_json(folder / LEDGER, ledger)


def read_ledger(folder: Path) -> Ledger:
    """Read a ledger, also one of version 2.

    Raises:
        DataError: It is missing, damaged, of a newer version, or names files outside of the run.
    """
    path = folder / LEDGER
    value = read_json(path)
    refuse_newer(value, VERSION, path)
    if isinstance(value, dict) and value.get("version") == 2 and isinstance(value.get("items"), list):
        value = {"patients": False, "min_images": 0, **value}
        value["items"] = [{"from_images": None, **i} if isinstance(i, dict) else i for i in value["items"]]
    try:
        return _ADAPTER.validate_python(value)
    except ValidationError as error:
        raise DataError(f"{path} is not a ledger", _DAMAGED) from error


def refuse_newer(value: object, known: int, path: Path) -> None:
    """Raise NewerVersionError if the content of a file says that it is of a later version than this program knows."""
    version = value.get("version") if isinstance(value, dict) else None
    if isinstance(version, int) and version > known:
        raise NewerVersionError(
            f"{path} is of version {version}; this Perdure reads versions up to {known}",
            "it was made by a newer Perdure: update with `pip install --upgrade perdure`",
        )


def run_of(folder: Path) -> Path:
    """The run folder of a task's folder."""
    return folder.parents[1]


def describe(folder: Path, path: Path) -> StoredFile:
    """A file in a task's folder, as its ledger lists it."""
    place = path.relative_to(run_of(folder)).as_posix()
    return {"file": place, "bytes": path.stat().st_size, "sha256": sha256(path)}
