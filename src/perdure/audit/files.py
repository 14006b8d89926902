"""Every file of a run: known by a ledger, listed in ``files.json``, and with the content that both of them say."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Final

from perdure.audit.findings import Audit
from perdure.audit.formats import events_problem
from perdure.audit.ledgers import Sealed
from perdure.audit.under_way import UnderWay, form_problem
from perdure.errors import DataError, NewerVersionError
from perdure.files import sha256
from perdure.kept.manifest import (
    ELSEWHERE,
    GROWING,
    KINDS,
    MANIFEST,
    SIGNATURE,
    TRACKING,
    Listed,
    problem_of,
    read_manifest,
)
from perdure.kept.store import STORE, StoredFile
from perdure.run_folder import LOCK

UNLISTED: Final = frozenset({MANIFEST, SIGNATURE, LOCK})
"""Files that ``files.json`` cannot list: itself, what is made over it, and what every process writes."""
STATE: Final = "state of the task under way"
IMAGES: Final = "working files: images of the task under way"
MARK: Final = "mark of working files in another folder"
_EVENTS: Final = re.compile(r"events\.out\.tfevents\.\d{6}\.perdure")


@dataclass(frozen=True)
class Places:
    """Files and folders of a run by place, links and special files left out; sizes in bytes."""

    files: dict[str, int]
    folders: list[str]

    @classmethod
    def walk(cls, run: Path, found: Audit) -> Places:
        """List them. Nothing is followed or opened: a link may point anywhere, a pipe would block."""
        places = cls({}, [])
        _tell_attributes(run, ".", found)
        for at, folders, files in os.walk(run):
            for name in sorted((*folders, *files)):
                path = Path(at) / name
                place = path.relative_to(run).as_posix()
                try:
                    status = path.lstat()
                except FileNotFoundError:
                    continue  # a temporary file of a run that is writing right now
                _tell_attributes(path, place, found)
                if stat.S_ISLNK(status.st_mode):
                    found.tell(place, "is a link; what it points to cannot be checked")
                elif stat.S_ISDIR(status.st_mode):
                    places.folders.append(place)
                elif stat.S_ISREG(status.st_mode):
                    places.files[place] = status.st_size
                else:
                    found.tell(place, "is no file: nothing of the kind belongs in a run")
        return places


def _tell_attributes(path: Path, place: str, found: Audit) -> None:
    """A user's extended attributes of a file or folder: no hash covers them. Some systems do not tell them."""
    if hasattr(os, "listxattr"):
        with suppress(OSError):  # a file system without them, or a file that has just been removed
            names = sorted(n for n in os.listxattr(path, follow_symlinks=False) if n.startswith("user."))
            if names:
                found.tell(place, f"has the extended attribute '{names[0][:60]}': remove it with `setfattr -x`")


def audit_files(
    run: Path, places: Places, sealed: Sealed, under_way: UnderWay | None, tracker: str, found: Audit
) -> dict[str, Listed] | None:
    """Compare all files of a run with its list of files and its ledgers; returns the list.

    Args:
        run: The run folder.
        places: What is there.
        sealed: The sealed tasks.
        under_way: The task that is under way or to come; ``None`` in a finished run.
        tracker: Name of the trackers' folder.
        found: Where to tell.

    Raises:
        NewerVersionError: The list is of a newer version.
    """
    listed = _read_list(run, found)
    strange = [place for place in places.files if place not in sealed.kinds]
    # the trackers of a finished run have written their last: then only listed event files are theirs
    growing = under_way is not None
    events = {p for p in strange if _may_be_events(p, tracker) and (growing or listed is None or p in listed)}
    working = {p for p in strange if under_way is not None and p not in events and under_way.may_hold(p)}
    kinds = (
        sealed.kinds
        | dict.fromkeys(events, TRACKING)
        | {p: _kind_under_way(p, under_way) for p in working if under_way is not None}
    )
    for place, size in sorted(places.files.items()):
        kind = kinds.get(place, "unknown")
        number, total = found.files.get(kind, (0, 0))
        found.files[kind] = (number + 1, total + size)
        if place in events:
            found.check(place, partial(_events_problem, run / place))
        elif place in working:
            found.check(place, partial(form_problem, run / place))
        elif place not in kinds:
            found.tell(place, "no ledger knows this file")
        listed_later = place in working or (kind in GROWING and growing)  # the log is listed when a task is sealed
        if listed is not None and place not in listed and place not in UNLISTED and not listed_later:
            found.tell(place, f"{MANIFEST} does not list it")
    entries = [entry for place, entry in (listed or {}).items() if place not in working]
    hashes = _compare_with_list(run, entries, places, sealed, growing, found)
    _compare_with_ledgers(run, places, sealed, hashes, found)
    if listed is not None and not growing:  # after the list, which may say so too
        for place in KINDS:
            if place not in places.files and place != "stream.json":  # of that is told where it is read
                found.tell(place, "is missing, and every finished run has it: restore it from a copy")
    _audit_folders(places.folders, {*sealed.kinds, *events, *working}, under_way, tracker, found)
    if places.files.get(LOCK):
        found.tell(LOCK, "is not empty")
    return listed


def _kind_under_way(place: str, under_way: UnderWay) -> str:
    if not under_way.is_working(place):
        return STATE
    return MARK if PurePosixPath(place).name == ELSEWHERE else IMAGES


def _read_list(run: Path, found: Audit) -> dict[str, Listed] | None:
    try:
        listed = read_manifest(run)
    except NewerVersionError:
        raise
    except DataError as error:
        found.tell(MANIFEST, f"cannot be used: {error.what}")
        return None
    if listed is None:
        found.tell(
            MANIFEST, "is missing: it was removed, or an earlier version made the run, which can then not be checked"
        )
    return listed


def _events_problem(path: Path) -> str | None:
    return events_problem(path.read_bytes())


def _may_be_events(place: str, tracker: str) -> bool:
    """Whether a file lies and is called as a tracker's event files do."""
    folder, _, name = place.rpartition("/")
    return folder == f"{TRACKING}/{tracker}" and _EVENTS.fullmatch(name) is not None


def _compare_with_list(
    run: Path, listed: Iterable[Listed], places: Places, sealed: Sealed, growing: bool, found: Audit
) -> dict[str, str]:
    """Each file that the list names has the kind, and the content, that the list says; returns hashes by place."""
    hashes: dict[str, str] = {}
    for entry in listed:
        place = entry["file"]
        expected = sealed.kinds.get(place, TRACKING if place.startswith(f"{TRACKING}/") else None)
        if expected is None:
            found.tell(place, f"{MANIFEST} lists it, but no ledger knows it")
        elif entry["kind"] != expected:
            found.tell(place, f"{MANIFEST} says that it is '{entry['kind']}', but it is '{expected}'")
        elif entry["kind"] in GROWING:
            found.tell(place, problem_of(run, entry, growing))
        else:
            hashes[place] = sha256(run / place) if place in places.files else ""
            found.tell(place, _mismatch(MANIFEST, entry, hashes[place]))
    return hashes


def _compare_with_ledgers(run: Path, places: Places, sealed: Sealed, hashes: dict[str, str], found: Audit) -> None:
    """Each file that ledgers list has the hash they give, and all of them give the same one; it is read once."""
    told: dict[str, str] = {}
    for ledger in sealed.ledgers.values():
        for file in (file for entry in ledger["items"] for file in entry["files"]):
            place, listed = file["file"], file["sha256"]
            if place in told:
                if told[place] != listed:
                    found.tell(place, "two ledgers give different hashes")
                continue
            told[place] = listed
            if place not in hashes:
                hashes[place] = sha256(run / place) if place in places.files else ""
            found.tell(place, _mismatch("the ledger", file, hashes[place]))
            if hashes[place] and file["bytes"] != places.files[place]:
                found.tell(place, "its size is not what the ledger says")


def _mismatch(lister: str, file: StoredFile | Listed, digest: str) -> str | None:
    if not digest:
        return f"{lister} lists it, but it is missing"
    return None if digest == file["sha256"] else f"its content is not what {lister} says (hash differs)"


def _audit_folders(
    folders: Iterable[str], files: Iterable[str], under_way: UnderWay | None, tracker: str, found: Audit
) -> None:
    """Folders are those of files that may be there: an empty one can tell something by its name."""
    allowed = {parent.as_posix() for place in files for parent in PurePosixPath(place).parents}
    allowed |= {"tasks"} if under_way is None else {"tasks", STORE, TRACKING, f"{TRACKING}/{tracker}"}
    for folder in folders:
        if folder not in allowed and not (under_way is not None and under_way.may_hold_folder(folder)):
            found.tell(folder, "no folder of this name belongs to the run (it must be one of stream.json)")
