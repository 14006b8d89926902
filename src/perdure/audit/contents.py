"""Texts of a run, each read by its own schema: whatever does not belong there, such as an image as text, is told.

Recipe, description of the stream and environment are read and written again; counts give the results again, and the
whole run its pages. What follows from other files must be equal to them, so that nothing can hide between the lines.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import html
import io
import json
import math
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import yaml
from pydantic import JsonValue, ValidationError

from perdure.audit.files import Audit, Places
from perdure.audit.formats import png_problem
from perdure.config.load import data_of_task, parse_recipe
from perdure.config.recipe import Recipe
from perdure.data.preparation import read_preparation
from perdure.engine.run_logger import EVENTS
from perdure.errors import PerdureError, UsageError
from perdure.files import parse_yaml, read_json
from perdure.kept.manifest import CASES, COUNTS
from perdure.metrics.cases import problem_of
from perdure.metrics.confusion import read_counts, write_counts
from perdure.metrics.results import write_results
from perdure.report.page import CARD, REPORT, write_model_card, write_report
from perdure.report.samples import Classes
from perdure.run_folder import ENVIRONMENT, ORIGIN
from perdure.streams.description import DescribedStream

MOST_TEXT: Final = 1000
"""Characters of one value; a picture of any use needs more."""
MOST_VALUES: Final = 256
"""Numbers in one list of free settings."""
_WORD: Final = re.compile(r"[\w.,=\[\] +-]{1,80}")
_ADDRESS: Final = re.compile(r"data:image/png;base64,([^\"'()\s<>]*)")
_AGAIN: Final = "`perdure report` writes it again"


def audit_contents(run: Path, stream: DescribedStream, sealed: Sequence[Path], places: Places, found: Audit) -> None:
    """Check every text file of a run that is there."""
    checks: dict[str, Callable[[Path], str | None]] = {
        "recipe.yaml": _recipe_problem,
        "stream.json": lambda path: _stream_problem(path, stream, run),
        "environment.json": _environment_problem,
        "log.jsonl": _log_problem,
    }
    for name, check in checks.items():
        if name in places.files:
            found.tell(name, _guarded(check, run / name))
    for task in sealed:
        for place in places.files:
            if place == f"tasks/{task.name}/counts.json":
                found.tell(place, _guarded(_counts_problem, run / place))
            elif place == f"tasks/{task.name}/{CASES}":
                found.tell(place, _guarded(_cases_problem, run / place))
            elif place.startswith(f"tasks/{task.name}/samples/") and place.endswith(".class.json"):
                found.tell(place, _guarded(_classes_problem, run / place))
    with tempfile.TemporaryDirectory() as folder:
        _audit_results(run, Path(folder), stream, sealed, places, found)
        _audit_pages(run, Path(folder), places, found)


def _guarded(check: Callable[[Path], str | None], path: Path) -> str | None:
    """A check's finding; that the file cannot be read at all is one too."""
    try:
        return check(path)
    except PerdureError as error:
        return f"cannot be used: {error.what.removeprefix(str(path)).strip()}"
    except (ValueError, OSError, RecursionError, yaml.YAMLError) as error:
        return f"cannot be read: {' '.join(str(error).split())[:200]}"


def _recipe_problem(path: Path) -> str | None:
    text = path.read_text(encoding="utf-8")
    raw = parse_yaml(text)
    if yaml.safe_dump(raw, sort_keys=False, allow_unicode=True) != text:
        return "is not as it was written: it holds comments or other text besides the settings"
    if not isinstance(raw, dict):
        return "is not a recipe"
    parse_recipe(raw, "recipe.yaml")
    return _too_much(raw)


def _stream_problem(path: Path, stream: DescribedStream, run: Path) -> str | None:
    raw = _canonical(path)
    if (extra := _extra(raw, stream.model_dump(mode="json"))) is not None:
        return f"holds '{extra}', which is no part of a stream"
    for task in stream.tasks:
        plain = read_preparation(task.preparation, "stream.json").model_dump(mode="json")
        if (extra := _extra(task.preparation, plain)) is not None:
            return f"holds '{extra}', which is no part of a preparation"
        if (wrong := _too_much(dict(task.data))) is not None:
            return wrong
    if (wrong := _too_much(raw, MOST_VALUES * 64)) is not None:
        return wrong
    recipe = _recipe(run)
    if recipe is None:
        return None
    said = recipe.data.settings.get("patients")
    if isinstance(said, bool) and said != stream.patients:
        return f"says patients: {str(stream.patients).lower()}, but recipe.yaml says {str(said).lower()}"
    if stream.tasks[-1].data != data_of_task(recipe):
        return "names other data than recipe.yaml"
    return None


def _recipe(run: Path) -> Recipe | None:
    try:
        raw = parse_yaml((run / "recipe.yaml").read_text(encoding="utf-8"))
        return parse_recipe(raw, "recipe.yaml") if isinstance(raw, dict) else None
    except (UsageError, OSError, ValueError, yaml.YAMLError):
        return None  # told of recipe.yaml itself


def _environment_problem(path: Path) -> str | None:
    raw = _canonical(path)
    if not isinstance(raw, dict):
        return "is no mapping of keys"
    origin = raw.get("first_weights")
    flat = {key: value for key, value in raw.items() if key != "first_weights"}
    if origin is not None:
        if not isinstance(origin, dict) or set(origin) - ORIGIN:
            return "holds other things than the origin of the first weights"
        flat |= origin
    if extra := sorted(set(raw) - ENVIRONMENT - {"first_weights"}):
        return f"holds the unknown key '{extra[0]}'"
    if bad := [k for k, v in flat.items() if not isinstance(v, str | int | None) or len(str(v)) > 200]:
        return f"'{bad[0]}' is not a version, a name or a number"
    return None


def _log_problem(path: Path) -> str | None:
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        entry = json.loads(line)
        if not isinstance(entry, dict) or json.dumps(entry) != line:
            return f"line {number} is not as the run writes it"
        if "event" in entry and entry["event"] not in EVENTS:
            return f"line {number} holds the unknown event '{str(entry['event'])[:40]}'"
        for key, value in entry.items():
            if key in ("event", "phase"):
                fits = isinstance(value, str) and _WORD.fullmatch(value) is not None
            else:
                fits = value is None or (isinstance(value, int | float) and math.isfinite(value))
            if not fits or not _WORD.fullmatch(key):
                return f"line {number} holds '{key[:40]}', which is not a number"
    tail = path.read_bytes().rpartition(b"\n")[2]
    return "holds more than whole lines" if len(tail) > MOST_TEXT else None


def _counts_problem(path: Path) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        sets = read_counts(path)
        write_counts(Path(folder) / "counts.json", sets)
        if (Path(folder) / "counts.json").read_bytes() != path.read_bytes():
            return "holds more than counts"
    return None if all(_WORD.fullmatch(name) for name in sets) else "holds more than counts"


def _cases_problem(path: Path) -> str | None:
    return problem_of(path, read_counts(path.with_name(COUNTS)))


def _classes_problem(path: Path) -> str | None:
    try:
        classes = Classes.model_validate(_canonical(path))
    except ValidationError:
        return "holds more than two classes"
    return None if classes.model_dump() == read_json(path) else "holds more than two classes"


def _audit_results(
    run: Path, folder: Path, stream: DescribedStream, sealed: Sequence[Path], places: Places, found: Audit
) -> None:
    """Result files hold what the counts give, to the byte."""
    try:
        counts = {t: read_counts(f / "counts.json") for t, f in enumerate(sealed)}
        write_results(folder, stream, counts)
    except PerdureError:
        return  # told of the counts themselves
    for name in ("results.csv", "results.json"):
        if name in places.files and (run / name).read_bytes() != (folder / name).read_bytes():
            found.tell(name, "holds other things than the results of the run's counts; `--resume` writes it again")


def _audit_pages(run: Path, folder: Path, places: Places, found: Audit) -> None:
    """Pages are what the run's other files give; they may have been written while the folder had another name."""
    for name, write in ((REPORT, write_report), (CARD, write_model_card)):
        if name not in places.files:
            continue
        try:
            page = (run / name).read_bytes().decode()
            heading = r"<h1>([^<\n]{1,120})</h1>" if name == REPORT else r"\A# Model card: ([^\n]{1,120})"
            title = re.search(heading, page)
            if title is None:
                found.tell(name, f"is not the run's page; {_AGAIN}")
                continue
            called = html.unescape(title[1]) if name == REPORT else title[1]
            again = write(run, folder / name, called).read_text(encoding="utf-8")
            (mine, wrong), (made, _) = _with_hashes(page), _with_hashes(again)
            if mine != made:
                what = f", such as an embedded picture that {wrong}" if wrong else ""
                found.tell(
                    name, f"is not what the run's other files give: something was added or changed{what}; {_AGAIN}"
                )
        except UnicodeDecodeError:
            found.tell(name, "is no text")
        except PerdureError as error:
            found.tell(name, f"cannot be compared with the run: {error.what}")


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
        with Image.open(io.BytesIO(content)) as image:
            digest = hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes())
        return f"picture {digest.hexdigest()}"

    text = _ADDRESS.sub(pixels, page)
    return text, problems[0] if problems else None


def _canonical(path: Path) -> JsonValue:
    """Content of a JSON file that is written as this program writes JSON. ValueError for any other bytes."""
    value: JsonValue = read_json(path)
    if json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n" != path.read_text(encoding="utf-8"):
        raise ValueError("it is not as it was written")
    return value


def _extra(raw: object, known: object) -> str | None:
    """First key of nested plain values that another one, read by a schema, does not have."""
    if isinstance(raw, dict) and isinstance(known, dict):
        strange = next((key for key in raw if key not in known), None)
        return strange or next((e for key in raw if (e := _extra(raw[key], known[key])) is not None), None)
    if isinstance(raw, list) and isinstance(known, list | tuple):
        return next((e for a, b in zip(raw, known, strict=False) if (e := _extra(a, b)) is not None), None)
    return None


def _too_much(value: object, most: int = MOST_VALUES) -> str | None:
    """Whether a value is long enough to be a picture, as text or as numbers."""
    if isinstance(value, str):
        return f"holds a text of {len(value):,} characters" if len(value) > MOST_TEXT else None
    if isinstance(value, dict):
        return next((w for part in value.items() for each in part if (w := _too_much(each, most))), None)
    if isinstance(value, list | tuple):
        numbers = sum(isinstance(part, int | float) for part in value)
        if numbers > most:
            return f"holds a list of {numbers:,} numbers"
        return next((w for part in value if (w := _too_much(part, most))), None)
    return None
