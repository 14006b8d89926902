"""The audit: is there anything in a run folder that the ledger does not know or that must not be there?"""

from __future__ import annotations

import getpass
import re
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, Final

from perdure.errors import DataError, PerdureError, RunError
from perdure.files import TEMPORARY, read_json, sha256
from perdure.kept.ledger import LEDGER, read_ledger

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
TASK_FILES: Final = frozenset({LEDGER, "counts.json", "done"})
TEXT_SUFFIXES: Final = frozenset({".yaml", ".yml", ".json", ".jsonl", ".csv", ".md", ".html", ".txt"})
EVENTS: Final = "events.out.tfevents."
_PATH: Final = re.compile(
    r"file://[^\s\"'<>]+"
    r"|(?<![\w.:/<~…-])/(?:[\w.+@-]+/)+[\w.+@-]*"
    r"|(?<!\w)[A-Za-z]:\\{1,2}\w[^\s\"'<>]*"
    r"|(?<!\\)\\{2,4}[\w.-]+\\{1,2}[\w.-]+"
)
_EMBEDDED: Final = re.compile(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=]+")
_ANYBODY: Final = frozenset({"root", "user", "admin", "localhost", "ubuntu", "debian", "runner", "docker", "jovyan"})


@dataclass
class Audit:
    """What an audit found.

    Attributes:
        items: Every ledger entry, with its task.
        bytes_by_kind: Bytes kept after the last sealed task, by kind.
        problems: One plain line for each thing that is wrong; empty means the audit passed.
    """

    items: list[dict[str, Any]] = field(default_factory=list)
    bytes_by_kind: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """True if nothing is wrong."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
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
    tasks, patients = _stream(run, found)
    known = {run / name for name in RUN_FILES}
    sealed = sorted(p for p in (run / "tasks").glob("*") if (p / "done").is_file())
    for folder in sealed:
        known |= _audit_task(folder, patients, found)
    under_way = (TEMPORARY, "resume/", f"tasks/{len(sealed):02d}-") if len(sealed) < tasks else ()
    for path in sorted(run.rglob("*")):
        where = path.relative_to(run).as_posix()
        if path.is_symlink():
            found.problems.append(f"{where}: is a link; what it points to cannot be checked")
        elif path.is_file() and path not in known and not _explained(where, under_way):
            found.problems.append(f"{where}: no ledger knows this file")
    _look_for_names(run, found)
    return found


def _explained(where: str, under_way: tuple[str, ...]) -> bool:
    """Whether a file belongs to the trackers, or to the work on a task that is not sealed yet."""
    name = where.rpartition("/")[2]
    if where.startswith("tracking/") and name.startswith(EVENTS):
        return True
    return bool(under_way) and (where.startswith(under_way[1:]) or name.startswith(TEMPORARY))


def _stream(run: Path, found: Audit) -> tuple[int, bool]:
    """Number of tasks of the run, and whether its images come from patients."""
    try:
        described = read_json(run / "stream.json")
        return len(described["tasks"]), bool(described["patients"])
    except DataError as error:
        found.problems.append(error.what)
    except (KeyError, TypeError):
        found.problems.append("stream.json: does not describe a stream")
    return 0, True


def _audit_task(folder: Path, patients: bool, found: Audit) -> set[Path]:
    """Files of a sealed task that may be there."""
    files = {folder / name for name in TASK_FILES}
    label = f"tasks/{folder.name}"
    try:
        ledger = read_ledger(folder)
    except PerdureError as error:
        found.problems.append(f"{label}/{LEDGER}: cannot be used: {error.what}")
        return files
    for entry in ledger["items"]:
        found.items.append({"task": folder.name, **entry})
        path, where = folder / entry["file"], f"{label}/{entry['file']}"
        if not path.is_file():
            found.problems.append(f"{where}: the ledger lists it, but it is missing")
        elif sha256(path) != entry["sha256"]:
            found.problems.append(f"{where}: its content is not what the ledger says (hash differs)")
        if entry["patient_data"] or (patients and is_raw(entry)):
            found.problems.append(f"{where}: raw patient data ({entry['kind']}: {entry['made_from']})")
        files.add(path)
    found.bytes_by_kind = dict(ledger["total_bytes"])
    return files


def is_raw(entry: Mapping[str, Any]) -> bool:
    """Whether a ledger entry holds images as they were read, whatever its mark ``patient_data`` says.

    Exemplars are, and previews, which are pictures of test images; except that a preview among the method's own
    tensors (``kept/NAME.safetensors``, which only the method's state gets into) shows what the method made up.
    """
    place = PurePosixPath(entry["file"])
    made_up = place.parts[:-1] == ("kept",) and place.suffix == ".safetensors"
    return entry["kind"] == "exemplars" or (entry["kind"] == "preview" and not made_up)


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
    names = {host, host.partition(".")[0], _user()}
    return sorted(n for n in names if len(n) > 3 and n.lower() not in _ANYBODY and n.lower() not in _own_words())


@cache
def _own_words() -> frozenset[str]:
    package = Path(__file__).parents[1]
    files = (p for p in package.rglob("*") if p.suffix in (".py", ".yaml", ".j2", ".css"))
    return frozenset(word for p in files for word in re.findall(r"\w+", p.read_text(encoding="utf-8").lower()))


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no account for this process, as in some containers
        return ""
