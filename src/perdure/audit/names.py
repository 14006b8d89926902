"""Paths of a machine in the texts of a run, and this machine's and this user's name in texts and file names."""

from __future__ import annotations

import getpass
import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Final

from perdure.audit.findings import Audit
from perdure.audit.ledgers import Sealed
from perdure.config.recipe import Recipe
from perdure.kept.ledger import LEDGER
from perdure.labels import MACHINE_PATH
from perdure.methods import METHODS
from perdure.streams.description import DescribedStream

TEXT_SUFFIXES: Final = frozenset({".yaml", ".yml", ".json", ".jsonl", ".csv", ".md", ".html", ".txt"})
# pictures within the report: base64 has slashes, and would often be taken for a path
_EMBEDDED: Final = re.compile(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=]+")
_ANYBODY: Final = frozenset({"root", "user", "admin", "localhost", "ubuntu", "debian", "runner", "docker", "jovyan"})


def audit_names(run: Path, files: Iterable[str], found: Audit) -> None:
    """Look for absolute paths in text files, and for this machine's and this user's name in texts and file names."""
    names = [re.compile(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])") for name in identifying_names()]
    for where in sorted(files):
        text = ""
        if PurePosixPath(where).suffix in TEXT_SUFFIXES:
            try:
                text = _EMBEDDED.sub("", (run / where).read_text(encoding="utf-8", errors="replace"))
            except OSError as error:
                found.tell(where, f"cannot be read: {error.strerror or error}")
        if match := MACHINE_PATH.search(text):
            found.problems.append(f"{where}: holds a path of a machine ({match.group()[:60]})")
        if any(name.search(text) or name.search(where) for name in names):
            found.problems.append(f"{where}: holds the name of this machine or user")


def audit_words(recipe: Recipe, stream: DescribedStream, sealed: Sealed, found: Audit) -> None:
    """What items say that they were made from is in words of this package and of the stream: a name is none of them.

    Whoever makes a sentence of these words can still tell something; of a method of somebody's own nothing is known.
    """
    if recipe.method.name not in METHODS:
        found.notes.append(
            "the method is not Perdure's own: what its items say that they were made from is not checked"
        )
        return
    own = " ".join([stream.dataset, *stream.names.values(), *(task.name for task in stream.tasks)]).lower()
    known = _own_words() | set(re.findall(r"\w+", own))
    for folder, ledger in sealed.ledgers.items():
        for entry in ledger["items"]:
            words = (word for word in re.findall(r"\w+", entry["made_from"].lower()) if not word.isdecimal())
            if strange := next((word for word in words if word not in known), ""):
                what = f"'{entry['name'][:40]}' is made from '{strange[:40]}', which is no word of the method"
                found.tell(f"tasks/{folder}/{LEDGER}", what)


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
