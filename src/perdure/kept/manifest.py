"""``files.json``: every file of a run with its kind, size and hash; what a signature is made over.

Only what has just been written is hashed and listed. Everything else keeps its entry, so that a file which somebody
changed is found later and not taken in. Files that a ledger lists have the ledger's hash and are not read again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic needs this one up to Python 3.11

from perdure.errors import DataError
from perdure.files import read_json, sha256, write_text
from perdure.kept.ledger import DONE, LEDGER, read_ledger, refuse_newer, run_of
from perdure.kept.store import Count, Digest, Place

MANIFEST: Final = "files.json"
SIGNATURE: Final = "files.sig"
VERSION: Final = 1
COUNTS: Final = "counts.json"
CASES: Final = "cases.csv"
TRACKING: Final = "tracking"
WORKING: Final = "working"
"""Folder of working files inside a run: arrays made from images of the task under way, never listed."""
ELSEWHERE: Final = "elsewhere"
"""Empty file in it that stands for working files in a folder of the user's."""
KINDS: Final[Mapping[str, str]] = {
    "recipe.yaml": "recipe",
    "stream.json": "stream",
    "environment.json": "environment",
    "log.jsonl": "log",
    "results.csv": "results",
    "results.json": "results",
    "report.html": "page",
    "MODEL_CARD.md": "page",
}
"""Kinds of the files that stand at the top of a run."""
CHANGES: Final = "changes.json"
NUMBERS: Final = "numbers.json"
IN_TASK: Final[Mapping[str, str]] = {
    LEDGER: "ledger",
    COUNTS: "counts",
    CASES: "counts",
    CHANGES: "counts",
    NUMBERS: "counts",
    DONE: "mark",
}
"""Kinds of the files that stand at the top of a task's folder; tasks whose images have one class each have no cases."""
GROWING: Final = frozenset({"log", TRACKING})
"""Files that only grow while a run goes on: what was there at the last entry has to be there still."""
REMADE: Final = frozenset({"results", "page"})
"""Files that follow from the others, and are written again whenever the run goes on."""


class Listed(TypedDict):
    """A file: place in the run folder, kind, size in bytes, hex SHA-256."""

    file: Place
    kind: str
    bytes: Count
    sha256: Digest


class Manifest(TypedDict):
    """What ``files.json`` holds, sorted by place."""

    version: int
    files: list[Listed]


_ADAPTER: Final = TypeAdapter(Manifest)


def read_manifest(run: Path) -> dict[str, Listed] | None:
    """Entries by place; ``None`` in runs of earlier versions, which have no manifest.

    Raises:
        DataError: It is damaged, of a newer version, or not as this program writes it.
    """
    path = run / MANIFEST
    if not path.is_file():
        return None
    value = read_json(path)
    refuse_newer(value, VERSION, path)
    try:
        manifest = _ADAPTER.validate_python(value, strict=True)
    except ValidationError as error:
        raise DataError(f"{path} is not a list of files", "the file was changed or is damaged: restore it") from error
    if _text(manifest["files"]).encode() != path.read_bytes():
        raise DataError(f"{path} is not as it was written", "the file was changed or is damaged: restore it")
    places = [entry["file"] for entry in manifest["files"]]
    if places != sorted(set(places)):  # of two entries of one file only one would be looked at, and an order can tell
        raise DataError(f"{path} lists files twice, or not in order", "the file was changed or is damaged: restore it")
    return {entry["file"]: entry for entry in manifest["files"]}


def list_files(run: Path, places: Iterable[str], tasks: Iterable[Path] = (), dropped: Iterable[str] = ()) -> bool:
    """Take files into the manifest that have just been written, or take them out.

    Args:
        run: The run folder.
        places: Files at its top, and event files of trackers; those that do not exist are left out.
        tasks: Folders of tasks that have just been sealed, with all that their ledgers list.
        dropped: Places that are listed no longer.

    Returns:
        Whether a signature of the run was removed, because it no longer holds.
    """
    before = read_manifest(run)
    entries = dict(before or {})
    for place in dropped:
        entries.pop(place, None)
    for place in places:
        if (run / place).is_file():
            kind = TRACKING if place.startswith(f"{TRACKING}/") else KINDS[place]
            entries[place] = _listed(run, place, kind)
    for folder in tasks:
        for entry in read_ledger(folder)["items"]:
            for file in entry["files"]:
                if file["file"] not in entries or entries[file["file"]]["sha256"] != file["sha256"]:
                    entries[file["file"]] = {**file, "kind": entry["kind"]}
        for name, kind in IN_TASK.items():
            if (folder / name).is_file():
                place = (folder / name).relative_to(run_of(folder)).as_posix()
                entries[place] = _listed(run, place, kind)
    if entries == before:
        return False
    write_text(run / MANIFEST, _text(entries[place] for place in sorted(entries)))
    signed = (run / SIGNATURE).is_file()
    (run / SIGNATURE).unlink(missing_ok=True)
    return signed


def event_files(run: Path) -> list[str]:
    """Places of the trackers' event files."""
    return sorted(p.relative_to(run).as_posix() for p in (run / TRACKING).glob("*/events.out.tfevents.*"))


def problem_of(run: Path, entry: Listed, growing: bool) -> str | None:
    """What is wrong with a listed file, in words after its place; ``None`` if nothing is.

    Args:
        run: The run folder.
        entry: The file.
        growing: Whether the run goes on, so that files which grow may be longer.
    """
    path = run / entry["file"]
    if path.is_symlink() or not path.is_file():
        return f"{MANIFEST} lists it, but it is missing"
    size = path.stat().st_size
    if growing and entry["kind"] in GROWING and size > entry["bytes"]:
        with path.open("rb") as stream:
            same = hashlib.sha256(stream.read(entry["bytes"])).hexdigest() == entry["sha256"]
    else:
        same = size == entry["bytes"] and sha256(path) == entry["sha256"]
    return None if same else f"its content is not what {MANIFEST} says (hash differs)"


def check_files(run: Path) -> None:
    """Hash every listed file of a run that is about to go on.

    Raises:
        DataError: A file is missing or was changed; those that are written again now, and trackers, do not count.
    """
    for place, entry in (read_manifest(run) or {}).items():
        if entry["kind"] in REMADE or entry["kind"] == TRACKING:
            continue
        if problem := problem_of(run, entry, growing=True):
            raise DataError(f"{run / place}: {problem}", "restore the file, or run `perdure audit` to see all of them")


def _listed(run: Path, place: str, kind: str) -> Listed:
    path = run / place
    return {"file": place, "kind": kind, "bytes": path.stat().st_size, "sha256": sha256(path)}


def _text(files: Iterable[Listed]) -> str:
    """One line per file: thousands of them stay readable."""
    lines = ",\n".join(
        "  " + json.dumps({key: entry[key] for key in ("file", "kind", "bytes", "sha256")}, ensure_ascii=False)
        for entry in files
    )
    return f'{{"version": {VERSION}, "files": [\n{lines}\n]}}\n'
