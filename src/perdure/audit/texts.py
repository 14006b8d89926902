"""Texts of a run, each read by its own schema: whatever does not belong there, such as an image as text, is told.

They are read and written again, and have to be equal to the byte, so that nothing can hide between the lines.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import yaml
from pydantic import JsonValue, ValidationError

from perdure.audit.findings import Audit
from perdure.config.load import data_of_tasks, parse_recipe
from perdure.config.recipe import Recipe
from perdure.data.catalog import check_options
from perdure.data.preparation import read_preparation
from perdure.data.volumes.options import CHANNEL_NAME
from perdure.engine.run_logger import EVENTS
from perdure.errors import PerdureError, UsageError
from perdure.files import parse_yaml, read_json
from perdure.kept.manifest import CASES, CHANGES, COUNTS, NUMBERS
from perdure.methods import METHODS
from perdure.metrics.cases import problem_of
from perdure.metrics.changes import BEFORE, OUTPUTS
from perdure.metrics.confusion import read_counts, write_counts
from perdure.metrics.numbers import DIGITS, read_numbers
from perdure.report.samples import Classes
from perdure.run_folder import ENVIRONMENT, ORIGIN
from perdure.streams.description import DescribedStream

MOST_TEXT: Final = 500
"""Characters of one value: more than any setting needs. A picture of 12 by 12 pixels fits in as many."""
MOST_TEXTS: Final = 4000
"""Characters of all texts of a recipe or a preparation together, keys included."""
MOST_VALUES: Final = 512
"""Numbers in them together, without the class order, whose names must be classes of the stream."""
MOST_BYTES: Final = 1 << 14
"""Size of a recipe without its class order."""
MOST_IMAGES: Final = 10**9
LONGEST_TAIL: Final = 1000
"""Of a line of the log that a kill cut short."""
MOST_KEYS: Final = 40
"""Of a line of the log."""
MOST_NAMES: Final = 300
"""Different keys and phases of a whole log."""
PHASES: Final = frozenset(
    {"train", "classes", "impressions", "next impressions", "neighbours", "moments", "counts", "prototypes", "spreads",
     "statistics", "labels", "generator", "pairs", "exemplars"}
)  # fmt: skip
"""Phases of the methods that come with the package: the log of a run with one of them names no other."""
MOST_PHASES: Final = 20
"""Of a method of somebody's own."""
_PHASE: Final = re.compile(r"[a-z][a-z0-9_ -]{0,23}")
"""Name of a phase of such a method."""
_BIG: Final = 1 << 63
_WORD: Final = re.compile(r"[\w.,=\[\] +-]{1,80}")
_KEY: Final = re.compile(r"[A-Za-z_][\w.,=\[\]-]{0,39}")
_FINGERPRINT: Final = re.compile(r"([0-9a-f]{24})?")


def audit_texts(
    run: Path, stream: DescribedStream, sealed: Sequence[Path], files: Collection[str], growing: bool, found: Audit
) -> None:
    """Check every text file of a run that is there, apart from ledgers and what follows from other files.

    Only the log of a run that goes on (``growing``) may end in the middle of a line, as a kill leaves it.
    """
    checks: dict[str, Callable[[Path], str | None]] = {
        "recipe.yaml": lambda path: _recipe_problem(path, stream),
        "stream.json": lambda path: _stream_problem(path, stream, run),
        "environment.json": _environment_problem,
        "log.jsonl": lambda path: _log_problem(path, LONGEST_TAIL if growing else 0),
    }
    for task in sealed:
        for place in files:
            inside = place.removeprefix(f"tasks/{task.name}/")
            if inside != place and (check := _check_of(inside)) is not None:
                checks[place] = check
    for place, check in checks.items():
        if place in files:
            found.check(place, partial(_guarded, check, run / place))


def _check_of(inside: str) -> Callable[[Path], str | None] | None:
    """What to check of a file in a task's folder."""
    if inside.startswith("samples/") and inside.endswith(".class.json"):
        return _classes_problem
    checks = {COUNTS: _counts_problem, CHANGES: _changes_problem, CASES: _cases_problem, NUMBERS: _numbers_problem}
    return checks.get(inside)


def _guarded(check: Callable[[Path], str | None], path: Path) -> str | None:
    """A check's finding; that the file cannot be read at all is one too."""
    try:
        return check(path)
    except PerdureError as error:
        return f"cannot be used: {error.what.removeprefix(str(path)).strip()}"
    except (ValueError, OSError, RecursionError, yaml.YAMLError) as error:
        return f"cannot be read: {' '.join(str(error).split())[:200]}"


def _recipe_problem(path: Path, stream: DescribedStream) -> str | None:
    text = path.read_text(encoding="utf-8")
    raw = parse_yaml(text)
    if yaml.safe_dump(raw, sort_keys=False, allow_unicode=True) != text:
        return "is not as it was written: it holds comments or other text besides the settings"
    if not isinstance(raw, dict):
        return "is not a recipe"
    recipe = parse_recipe(raw, "recipe.yaml")
    order = recipe.stream.order
    known: set[object] = {c.name for c in stream.classes} | {c.id for c in stream.classes}
    if not isinstance(order, str) and (len(order) > len(known) or not known.issuperset(order)):
        return "orders other classes than those of the stream"
    for data in recipe.sets:
        check_options(data.name, data.settings)
    section = raw["stream"]
    plain = {**raw, "stream": {k: v for k, v in section.items() if k != "order"} if isinstance(section, dict) else None}
    if len(yaml.safe_dump(plain).encode()) > MOST_BYTES:
        return f"holds more than {MOST_BYTES:,} bytes, and no recipe needs so many"
    return _too_much(plain)


def _stream_problem(path: Path, stream: DescribedStream, run: Path) -> str | None:
    raw = _canonical(path)
    if (extra := _extra(raw, stream.model_dump(mode="json"))) is not None:
        return f"holds '{extra}', which is no part of a stream"
    for task in stream.tasks:
        plain = read_preparation(task.preparation, "stream.json").model_dump(mode="json")
        if (extra := _extra(task.preparation, plain)) is not None:
            return f"holds '{extra}', which is no part of a preparation"
        channels = plain.get("modality", ())
        if odd := next((name for name in channels if not CHANNEL_NAME.fullmatch(str(name))), ""):
            return f"names the channel '{odd[:40]}', which is no short name of letters and digits"
        if (wrong := _too_much([dict(task.data), task.preparation])) is not None:
            return wrong
        if not all(map(_FINGERPRINT.fullmatch, (task.digest, task.content, task.pool, task.tests))):
            return "holds a fingerprint of images that is none"
        if not 0 <= task.images < MOST_IMAGES:
            return "holds a number of images that no task has"
    if any(not 0 <= value <= 255 for known in stream.classes for value in known.color):
        return "holds a colour that is none"
    if long := [text for text in (stream.protocol, stream.dataset) if len(text) > MOST_TEXT]:
        return f"holds a text of {len(long[0]):,} characters"
    recipe = _recipe(run)
    if recipe is None:
        return None
    said = [value for part in recipe.sets if isinstance(value := part.settings.get("patients"), bool)]
    if len(said) == len(recipe.sets) and any(said) != stream.patients:
        return f"says patients: {str(stream.patients).lower()}, but recipe.yaml says {str(any(said)).lower()}"
    if [task.data for task in stream.tasks] != data_of_tasks(recipe, len(stream.tasks)):
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
    if bad := [
        k
        for k, v in flat.items()
        if not (isinstance(v, str | None) or (type(v) is int and 0 <= v < 1 << 31)) or len(str(v)) > 200
    ]:
        return f"'{bad[0]}' is not a version, a name or a number"
    return None


def _log_problem(path: Path, longest_tail: int) -> str | None:
    recipe = _recipe(path.parent)
    own = recipe is None or recipe.method.name not in METHODS
    seen: set[str] = set()
    phases: set[str] = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        entry = json.loads(line)
        if not isinstance(entry, dict) or json.dumps(entry) != line:
            return f"line {number} is not as the run writes it"
        if "event" in entry and entry["event"] not in EVENTS:
            return f"line {number} holds the unknown event '{str(entry['event'])[:40]}'"
        if "phase" in entry:
            phases.add(phase := str(entry["phase"]))
            if not (_PHASE.fullmatch(phase) if own else phase in PHASES) or len(phases) > MOST_PHASES:
                return f"line {number} names the phase '{phase[:40]}', which no method here has"
        for key, value in entry.items():
            if key in ("event", "phase"):
                fits = isinstance(value, str)
            elif isinstance(value, int):  # before any conversion: one of 320 digits is no float
                fits = abs(value) < _BIG
            else:
                fits = value is None or (isinstance(value, float) and math.isfinite(value))
            if not fits or not _KEY.fullmatch(key):
                return f"line {number} holds '{key[:40]}', which is not a number"
        seen.update(entry)
        if len(entry) > MOST_KEYS or len(seen) > MOST_NAMES:
            return f"line {number} holds more figures, or more different ones, than a run writes"
    tail = path.read_bytes().rpartition(b"\n")[2]
    return "holds more than whole lines" if len(tail) > longest_tail else None


def _counts_problem(path: Path) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        sets = read_counts(path)
        write_counts(Path(folder) / "counts.json", sets)
        if (Path(folder) / "counts.json").read_bytes() != path.read_bytes():
            return "holds more than counts"
    return None if all(_WORD.fullmatch(name) for name in sets) else "holds more than counts"


def _changes_problem(path: Path) -> str | None:
    if (wrong := _counts_problem(path)) is not None:
        return wrong
    sets, counts = read_counts(path), list(read_counts(path.with_name(COUNTS)).values())
    if set(sets) != {OUTPUTS, BEFORE}:
        return "holds other counts than those of a change"
    outputs, before = sets[OUTPUTS], sets[BEFORE]
    fits = [one for one in counts if one.labels == outputs.labels and one.cases == outputs.cases == before.cases]
    if not fits or before.labels != outputs.labels[: len(before.labels)]:
        return "was counted on other classes or cases than the task's"
    # voxels without label are in the outputs only; where there are none both count the same voxels
    labelled, said = before.matrix.sum(0), outputs.matrix.sum(1)[: len(before.labels)]
    if (labelled > said).any() or (labelled.sum() == said.sum() and (labelled != said).any()):
        return "its two tables do not count the same voxels"
    # ground truth of a class counts whatever the model says; background is left out where an earlier class may be
    if not any((before.truth == one.truth[: len(before.labels)])[1:].all() for one in fits):
        return f"has other voxels of earlier classes in its ground truth than {COUNTS}"
    return None


def _numbers_problem(path: Path) -> str | None:
    numbers = read_numbers(path)
    if numbers.model_dump(mode="json") != _canonical(path):
        return "is not as it was written"
    if len(numbers.earlier) not in (0, int(path.parent.name[:2])):
        return "holds figures of more or fewer models than there were before the task"
    if any(dice is not None and round(dice, DIGITS) != dice for dice in (numbers.untrained, *numbers.earlier)):
        return f"holds a figure with more than {DIGITS} digits"
    return None


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


def _too_much(value: object) -> str | None:
    """Whether nested settings hold enough to be a picture, as text or as numbers, in one value or in all together."""
    texts, numbers = 0, 0
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            left += [*part, *part.values()]
        elif isinstance(part, list | tuple):
            left += part
        elif isinstance(part, str):
            texts += len(part)
            if len(part) > MOST_TEXT:
                return f"holds a text of {len(part):,} characters"
        elif part is not None:
            numbers += 1
            if isinstance(part, int) and abs(part) >= _BIG:
                return "holds a number of more than 64 bits"
    if texts > MOST_TEXTS:
        return f"holds texts of {texts:,} characters"
    return f"holds {numbers:,} numbers" if numbers > MOST_VALUES else None
