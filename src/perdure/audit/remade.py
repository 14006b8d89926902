"""Results and pages follow from the rest of a run: written again, they are equal, so nothing can hide in them."""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import html
import io
import re
import tempfile
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Final

from perdure.audit.findings import Audit
from perdure.audit.formats import png_problem
from perdure.errors import PerdureError
from perdure.kept.manifest import CASES, CHANGES, COUNTS, NUMBERS
from perdure.metrics.definitions import figure
from perdure.metrics.results import gather_results, write_results
from perdure.report.page import CARD, REPORT, write_model_card, write_report
from perdure.streams.description import DescribedStream

_ADDRESS: Final = re.compile(r"data:image/png;base64,([^\"'()\s<>]*)")
_ESCAPED: Final = re.compile(r"\\([\\`*|\[\]])")
"""What :func:`perdure.report.render.cell` puts a backslash before."""
_RESTORE: Final = "restore that from a copy: --resume and `perdure report` would write what the others say over it"
"""Advice where files disagree: which of them was changed cannot be told, and writing one again destroys evidence."""

_SOURCES: Final = f"recipe.yaml, stream.json, environment.json, log.jsonl or {CHANGES} of a task"
"""What a page shows that no other file tells too: where it was changed, only the page gives that away."""


def audit_remade(
    run: Path, stream: DescribedStream, sealed: Sequence[Path], files: Collection[str], found: Audit
) -> None:
    """Write results and pages of a run again, in a folder of their own, and compare them with those that are there."""
    with tempfile.TemporaryDirectory() as folder:
        _audit_results(run, Path(folder), stream, sealed, files, found)
        _audit_pages(run, Path(folder), files, found)


def _audit_results(
    run: Path, folder: Path, stream: DescribedStream, sealed: Sequence[Path], files: Collection[str], found: Audit
) -> None:
    """Result files hold what the counts and cases of the tasks give, to the byte."""
    try:
        write_results(folder, gather_results(stream, sealed))
    except PerdureError:
        return  # told of the counts themselves
    for name in ("results.csv", "results.json"):
        if name in files:
            found.check(name, partial(_result_problem, run / name, folder / name))


def _result_problem(path: Path, again: Path) -> str | None:
    if path.read_bytes() == again.read_bytes():
        return None
    where, source = "", f"{COUNTS}, {CASES} and {NUMBERS}"
    if path.suffix == ".csv":
        where, source = _first_difference(path, again, source)
    return f"{where}does not agree with {source} of the tasks: one of them was changed; {_RESTORE}"


def _first_difference(path: Path, again: Path, source: str) -> tuple[str, str]:
    """Where two tables of results differ first, in words, and the files that this line comes from."""
    mine, made = (list(csv.reader(table.read_text(encoding="utf-8").splitlines())) for table in (path, again))
    for number, (held, given) in enumerate(zip_longest(mine, made), 1):
        if held is None or given is None or held[:5] != given[:5]:
            break
        if held[5:6] != given[5:6]:  # the same figure of the same class with another value
            _, task, _, called, name, value, *_ = given
            of = f" of '{called}'" if called else ""
            says = "".join(held[5:6])[:30]
            where = f"line {number} ({name}{of} after {task}) says {says}, and the tasks' files give {value}: it "
            return where, CASES if figure(name).definition.scope == "case" else source
    return "", source


def _audit_pages(run: Path, folder: Path, files: Collection[str], found: Audit) -> None:
    """Pages are what the run's other files give; they may have been written while the folder had another name."""
    for name, write in ((REPORT, write_report), (CARD, write_model_card)):
        if name in files:
            found.check(name, partial(_page_problem, run, folder, name, write, found))


def _page_problem(
    run: Path, folder: Path, name: str, write: Callable[[Path, Path, str], Path], found: Audit
) -> str | None:
    # a page is evidence of what other files held, and must not be written anew from them
    then = "see the other problems first: the page may be right"
    if found.passed:
        then = f"here or in {_SOURCES}; compare them with a copy: `perdure report` would write over it what they say"
    try:
        page = (run / name).read_bytes().decode()
        heading = r"<h1>([^<\n]{1,120})</h1>" if name == REPORT else r"\A# Model card: ([^\n]{1,120})"
        title = re.search(heading, page)
        if title is None:
            return f"is not the run's page: something was changed, {then}"
        called = html.unescape(title[1] if name == REPORT else _ESCAPED.sub(r"\1", title[1]))
        again = write(run, folder / name, called).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return "is no text"
    except PerdureError as error:
        return f"cannot be compared with the run: {error.what}"
    (mine, wrong), (made, _) = _with_hashes(page), _with_hashes(again)
    if mine == made:
        return None
    what = f", such as an embedded picture that {wrong}" if wrong else ""
    return f"is not what the run's other files give: something was added or changed{what}; {then}"


def _with_hashes(page: str) -> tuple[str, str | None]:
    """A page with a hash of its pixels in place of each embedded PNG, and what is wrong with one of these.

    Of pixels, because another version of a library packs the same pixels into other bytes. A picture that holds more
    than pixels stays as it is, and so differs from what the run gives.
    """
    from PIL import Image

    problems: list[str] = []

    def pixels(match: re.Match[str]) -> str:
        try:
            content = base64.b64decode(match[1], validate=True)
        except (binascii.Error, ValueError):
            content = b""
        wrong = png_problem(content)
        if wrong is not None:
            problems.append(wrong)
            return match[0]
        try:
            with Image.open(io.BytesIO(content)) as image:
                digest = hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes())
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            problems.append(f"cannot be read ({' '.join(str(error).split())[:80]})")
            return match[0]
        return f"picture {digest.hexdigest()}"

    text = _ADDRESS.sub(pixels, page)
    return text, problems[0] if problems else None
