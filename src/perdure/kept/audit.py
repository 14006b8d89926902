"""The audit: is there anything in a run folder that the ledger does not know or that must not be there?"""

from __future__ import annotations

import getpass
import re
import socket
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from perdure.errors import PerdureError, RunError
from perdure.files import TEMPORARY, sha256
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
TEXT_SUFFIXES: Final = frozenset({".yaml", ".json", ".jsonl", ".csv", ".md", ".html"})
_PATH: Final = re.compile(
    r"(?<![\w.:/<-])(/(?:home|Users|root|mnt|data|tmp|var|media|srv|opt)/[^\s\"'<>]+|[A-Za-z]:\\\\?[^\s\"'<>]+)"
)


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
        raise RunError(
            f"{run} is not a run folder: it has no recipe.yaml", "give the folder that `perdure run` wrote"
        )
    found = Audit()
    known = {run / name for name in RUN_FILES}
    for folder in sorted(p for p in (run / "tasks").glob("*") if p.is_dir()):
        known |= {folder / name for name in TASK_FILES}
        if (folder / "done").exists():
            known |= _audit_task(folder, found)
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        relative = path.relative_to(run)
        under_way = relative.parts[0] == "resume" or (
            relative.parts[0] == "tasks" and not (run / "/".join(relative.parts[:2]) / "done").exists()
        )
        tracked = relative.parts[0] == "tracking"
        if path not in known and not (under_way or tracked or path.name.startswith(TEMPORARY)):
            found.problems.append(f"{relative}: no ledger knows this file")
    _audit_text(run, found)
    return found


def _audit_task(folder: Path, found: Audit) -> set[Path]:
    try:
        ledger = read_ledger(folder)
    except PerdureError as error:
        found.problems.append(error.what)
        return set()
    label = f"tasks/{folder.name}"
    for entry in ledger["items"]:
        found.items.append({"task": folder.name, **entry})
        path = folder / entry["file"]
        if not path.is_file():
            found.problems.append(f"{label}/{entry['file']}: the ledger lists it, but it is missing")
        elif sha256(path) != entry["sha256"]:
            found.problems.append(
                f"{label}/{entry['file']}: its content is not what the ledger says (hash differs)"
            )
        if entry["patient_data"]:
            found.problems.append(
                f"{label}/{entry['file']}: raw patient data ({entry['kind']}: {entry['made_from']})"
            )
    found.bytes_by_kind = dict(ledger["total_bytes"])
    return {folder / entry["file"] for entry in ledger["items"]}


def _audit_text(run: Path, found: Audit) -> None:
    secrets = [s for s in (socket.gethostname(), _user()) if len(s) > 3]
    for path in sorted(p for p in run.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file()):
        text = path.read_text(encoding="utf-8", errors="replace")
        text = re.sub(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=]+", "", text)
        where = path.relative_to(run)
        if match := _PATH.search(text):
            found.problems.append(f"{where}: holds a path of a machine ({match.group(1)[:60]})")
        found.problems += [
            f"{where}: holds the name of this machine or user"
            for s in secrets
            if re.search(rf"\b{re.escape(s)}\b", text)
        ]


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no account for this process, as in some containers
        return ""
