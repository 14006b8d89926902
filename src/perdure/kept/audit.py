"""The audit: is there anything in a run folder that the ledger does not know or that must not be there?"""

from __future__ import annotations

import getpass
import re
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Final

from perdure.errors import DataError, PerdureError, RunError
from perdure.files import TEMPORARY, sha256
from perdure.kept.ledger import DONE, LEDGER, Entry, read_ledger, sealed_folders
from perdure.kept.store import STORE
from perdure.streams.description import read_stream

RUN_FILES: Final = frozenset(
    {
        "recipe.yaml",
        "environment.json",
        "stream.json",
        "log.jsonl",
        "results.csv",
        "results.json",
        "report.html",
        "MODEL_CARD.md",
        ".lock",
    }
)
TASK_FILES: Final = frozenset({LEDGER, "counts.json", "cases.csv", DONE})
TEXT_SUFFIXES: Final = frozenset({".yaml", ".yml", ".json", ".jsonl", ".csv", ".md", ".html", ".txt"})
EVENTS: Final = "events.out.tfevents."
_PATH: Final = re.compile(
    r"file://[^\s\"'<>]+"
    # a slash, two names or more; not the end of a URL, of a tag, of a relative path or of a fraction
    r"|(?<![\w.:/<~…-])/(?:[\w.+@-]+/)+[\w.+@-]*"
    # a drive, and a server; in JSON each backslash stands twice
    r"|(?<!\w)[A-Za-z]:\\{1,2}\w[^\s\"'<>]*"
    r"|(?<!\\)\\{2,4}[\w.-]+\\{1,2}[\w.-]+"
)
# pictures within the report: base64 has slashes, and would often be taken for a path
_EMBEDDED: Final = re.compile(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=]+")
_ANYBODY: Final = frozenset({"root", "user", "admin", "localhost", "ubuntu", "debian", "runner", "docker", "jovyan"})


class Item(Entry):
    """An entry of a task's ledger, with the folder name of the task."""

    task: str


@dataclass
class Audit:
    """What an audit found.

    Attributes:
        items: Every ledger entry, with its task.
        bytes_by_kind: Bytes kept after the last sealed task, by kind.
        problems: One plain line for each thing that is wrong; empty means the audit passed.
    """

    items: list[Item] = field(default_factory=list)
    bytes_by_kind: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """True if nothing is wrong."""
        return not self.problems

    def to_json(self) -> dict[str, object]:
        """Plain data for ``--json``."""
        return {"passed": self.passed, **asdict(self)}


def audit(run: Path) -> Audit:
    """Compare a run folder with its ledgers and look for patient data, names and paths.

    Raises:
        RunError: ``run`` is not a run folder.
    """
    if not (run / "recipe.yaml").is_file():
        raise RunError(f"{run} is not a run folder: it has no recipe.yaml", "give the folder that `perdure run` wrote")
    found = Audit()
    stream = None
    try:
        stream = read_stream(run / "stream.json")
    except DataError as error:
        found.problems.append(error.what)
    names = [task.name for task in stream.tasks] if stream is not None else []
    patients = stream is None or stream.patients
    sealed = sealed_folders(run, names)
    known = {run / name for name in RUN_FILES} | _audit_tasks(run, sealed, patients, found)
    task, unfinished = f"{len(sealed):02d}-", len(sealed) < len(names)
    under_way = ("resume/", f"tasks/{task}", f"{STORE}/{task}")
    for path in sorted(run.rglob("*")):
        where = path.relative_to(run).as_posix()
        tracked = where.startswith("tracking/") and path.name.startswith(EVENTS)
        working = unfinished and (where.startswith(under_way) or path.name.startswith(TEMPORARY))
        if path.is_symlink():
            found.problems.append(f"{where}: is a link; what it points to cannot be checked")
        elif path.is_file() and path not in known and not tracked and not working:
            found.problems.append(f"{where}: no ledger knows this file")
    _look_for_names(run, found)
    return found


def _audit_tasks(run: Path, sealed: Sequence[Path], patients: bool, found: Audit) -> set[Path]:
    """Check all that the ledgers of sealed tasks list; return the files that may be there.

    A file is read once, however many ledgers name it.
    """
    files = {folder / name for folder in sealed for name in TASK_FILES}
    hashes: dict[str, str] = {}
    for folder in sealed:
        try:
            ledger = read_ledger(folder)
        except PerdureError as error:
            found.problems.append(f"tasks/{folder.name}/{LEDGER}: cannot be used: {error.what}")
            continue
        for entry in ledger["items"]:
            found.items.append({"task": folder.name, **entry})
            for stored in entry["files"]:
                where, listed = stored["file"], stored["sha256"]
                if where not in hashes:
                    hashes[where] = listed  # a file that is named by many ledgers gives one problem
                    if not (run / where).is_file():
                        found.problems.append(f"{where}: the ledger lists it, but it is missing")
                    elif sha256(run / where) != listed:
                        found.problems.append(f"{where}: its content is not what the ledger says (hash differs)")
                elif hashes[where] != listed:
                    found.problems.append(f"{where}: two ledgers give different hashes")
            if entry["patient_data"] or (patients and is_raw(entry)):
                where = entry["files"][0]["file"] if entry["files"] else f"tasks/{folder.name}/{LEDGER}"
                more = f" and {len(entry['files']) - 1} more files" if len(entry["files"]) > 1 else ""
                found.problems.append(f"{where}{more}: raw patient data ({entry['kind']}: {entry['made_from']})")
        found.bytes_by_kind = ledger["total_bytes"]
    return files | {run / where for where in hashes}


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


def _look_for_names(run: Path, found: Audit) -> None:
    """Look for absolute paths in text files, and for this machine's and this user's name in texts and file names."""
    names = [re.compile(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])") for name in identifying_names()]
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        where = path.relative_to(run)
        text = ""
        if path.suffix in TEXT_SUFFIXES:
            text = _EMBEDDED.sub("", path.read_text(encoding="utf-8", errors="replace"))
        if match := _PATH.search(text):
            found.problems.append(f"{where}: holds a path of a machine ({match.group()[:60]})")
        if any(name.search(text) or name.search(str(where)) for name in names):
            found.problems.append(f"{where}: holds the name of this machine or user")


def identifying_names() -> list[str]:
    """Names of this machine and user that say who or where; words that the program uses itself cannot be told apart."""
    host = socket.gethostname()
    names = {host, host.partition(".")[0]}
    with suppress(OSError, KeyError):  # no account for this process, as in some containers
        names.add(getpass.getuser())
    return sorted(n for n in names if len(n) > 3 and n.lower() not in _ANYBODY and n.lower() not in _own_words())


@cache
def _own_words() -> frozenset[str]:
    package = Path(__file__).parents[1]
    files = (p for p in package.rglob("*") if p.suffix in (".py", ".yaml", ".j2", ".css"))
    return frozenset(word for p in files for word in re.findall(r"\w+", p.read_text(encoding="utf-8").lower()))
