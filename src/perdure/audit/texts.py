"""Texts of a run, each read by its own schema: whatever does not belong there, such as an image as text, is told.

They are read and written again, and have to be equal to the byte, so that nothing can hide between the lines.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Final

import yaml
from pydantic import JsonValue, ValidationError

from perdure.audit.findings import Audit
from perdure.config.load import data_of_task, parse_recipe
from perdure.config.recipe import Recipe
from perdure.data.preparation import read_preparation
from perdure.engine.run_logger import EVENTS
from perdure.errors import PerdureError, UsageError
from perdure.files import parse_yaml, read_json
from perdure.kept.manifest import CASES, COUNTS
from perdure.metrics.cases import problem_of
from perdure.metrics.confusion import read_counts, write_counts
from perdure.report.samples import Classes
from perdure.run_folder import ENVIRONMENT, ORIGIN
from perdure.streams.description import DescribedStream

MOST_TEXT: Final = 1000
"""Characters of one value; a picture of any use needs more."""
MOST_VALUES: Final = 256
"""Numbers in one list of free settings."""
_WORD: Final = re.compile(r"[\w.,=\[\] +-]{1,80}")


def audit_texts(
    run: Path, stream: DescribedStream, sealed: Sequence[Path], files: Collection[str], growing: bool, found: Audit
) -> None:
    """Check every text file of a run that is there, apart from ledgers and what follows from other files.

    Only the log of a run that goes on (``growing``) may end in the middle of a line, as a kill leaves it.
    """
    checks: dict[str, Callable[[Path], str | None]] = {
        "recipe.yaml": _recipe_problem,
        "stream.json": lambda path: _stream_problem(path, stream, run),
        "environment.json": _environment_problem,
        "log.jsonl": lambda path: _log_problem(path, MOST_TEXT if growing else 0),
    }
    for task in sealed:
        for place in files:
            inside = place.removeprefix(f"tasks/{task.name}/")
            if inside != place and (check := _check_of(inside)) is not None:
                checks[place] = check
    for place, check in checks.items():
        if place in files:
            found.tell(place, _guarded(check, run / place))


def _check_of(inside: str) -> Callable[[Path], str | None] | None:
    """What to check of a file in a task's folder."""
    if inside.startswith("samples/") and inside.endswith(".class.json"):
        return _classes_problem
    return {COUNTS: _counts_problem, CASES: _cases_problem}.get(inside)


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


def _log_problem(path: Path, longest_tail: int) -> str | None:
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
    return "holds more than whole lines" if len(tail) > longest_tail else None


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
