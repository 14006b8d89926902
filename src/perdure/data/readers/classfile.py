"""Class files: the class of each number in the masks.

Text (``classes.txt``, ``class_names.txt``): either ``id name`` on each line (the name may contain spaces), or one
name per line. Names alone are numbered from 1, or from 0 if the first one is a word for background. ``#`` starts a
comment line. JSON (``classes.json``): a list of names, ``{"1": "cat", ...}``, ``{"cat": 1, ...}``, or a list of
``{"id": 1, "name": "cat", "kind": "thing", "color": [r, g, b]}`` (the last two are optional).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple, get_args

from perdure.errors import DataError, nearest
from perdure.files import DEEPEST, nesting, refuse_special
from perdure.labels import BACKGROUND, IGNORE, ClassInfo, Color, Kind, LabelSpace, spread_colors, wrong_name

CLASS_FILES: Final = ("classes.txt", "class_names.txt", "classes.json")
_NUMBERED = re.compile(r"(\d+)[\s,:;]+(\S.*)")
_BACKGROUND_WORDS: Final = {"background", "bg", "backgrd", "unlabelled", "unlabeled"}
_HELP: Final = "write one class per line: its number, a space, its name"


class Row(NamedTuple):
    """One class as the file gives it."""

    id: int
    name: str
    kind: Kind = "thing"
    color: Color | None = None


def find_class_file(*folders: Path) -> Path | None:
    """Return the first class file that one of the folders holds. Two in one folder are a DataError."""
    for folder in folders:
        found = [folder / name for name in CLASS_FILES if (folder / name).is_file()]
        if len(found) > 1:
            raise DataError(f"{folder} holds two class files, {found[0].name} and {found[1].name}", "keep one of them")
        if found:
            return found[0]
    return None


def read_class_file(path: Path) -> LabelSpace:
    """Read a class file into a label space. The name of class 0, if given, is that of the background.

    Raises:
        DataError: The file is unreadable or empty, repeats an id or a name, or has an id outside 0..4094.
    """
    refuse_special(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the class file {path} cannot be read: {error}", _HELP) from error
    rows = _json_rows(path, text) if path.suffix == ".json" else _text_rows(path, text)
    by_id: dict[int, str] = {}
    by_name: dict[str, int] = {}
    for number, name, *_ in rows:
        if problem := wrong_name(name):
            raise DataError(f"{path}: {problem}", "shorten or correct the name")
        if number in by_id:
            raise DataError(
                f"{path} gives id {number} twice: '{by_id[number]}' and '{name}'", "give each class its own id"
            )
        if name in by_name:
            raise DataError(
                f"{path} gives the name '{name}' twice: ids {by_name[name]} and {number}",
                "give each class its own name",
            )
        if not BACKGROUND <= number < IGNORE:
            raise DataError(
                f"{path}: id {number} of '{name}' is out of range",
                f"ids run from 1 to {IGNORE - 1}; 0 is background",
            )
        by_id[number], by_name[name] = name, number
    foreground = [row for row in rows if row.id != BACKGROUND]
    if not foreground:
        raise DataError(f"{path} lists no class", _HELP)
    colors = spread_colors(len(foreground))
    classes = (
        ClassInfo(row.id, row.name, row.kind, row.color or color) for row, color in zip(foreground, colors, strict=True)
    )
    return LabelSpace(tuple(classes), by_id.get(BACKGROUND, "background"))


def _text_rows(path: Path, text: str) -> list[Row]:
    lines = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1)]
    lines = [(n, line) for n, line in lines if line and not line.startswith("#")]
    if not lines:
        raise DataError(f"the class file {path} is empty", _HELP)
    matches = [_NUMBERED.fullmatch(line) for _, line in lines]
    if not any(matches):
        return _numbered([line for _, line in lines])
    rows: list[Row] = []
    for (number, line), found in zip(lines, matches, strict=True):
        if found is None:
            raise DataError(f"{path} line {number} has no class number: '{line}'", "number all lines or none")
        rows.append(Row(_number(found[1]), found[2]))
    return rows


def _number(digits: str) -> int:
    """A class id; of absurdly many digits, which Python refuses to convert, one that is as far out of range."""
    return int(digits.lstrip("0")[:9] or "0")


def _numbered(names: list[str]) -> list[Row]:
    """Rows of names alone: the first one may be the background, which published lists often begin with."""
    first = 0 if re.sub(r"[\W_]", "", names[0]).lower() in _BACKGROUND_WORDS else 1
    return [Row(k, name) for k, name in enumerate(names, first)]


def _json_rows(path: Path, text: str) -> list[Row]:
    def unique(items: list[tuple[str, object]]) -> dict[str, object]:
        # a plain reader would keep the last of two equal keys, and a class would vanish without a word
        for key, times in Counter(key for key, _ in items).items():
            if times > 1:
                raise DataError(f"{path} has the key '{key}' twice", "give each class once")
        return dict(items)

    if nesting(text) > DEEPEST:
        raise DataError(f"{path} is not a class list: it is nested too deeply", _HELP)
    try:
        value = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON: {error}", "check brackets, quotes and commas") from error
    match value:
        case {**entries} if entries:
            pairs = [(str(key), value) for key, value in entries.items()]
            names = [Row(_number(key), name) for key, name in pairs if key.isdecimal() and type(name) is str]
            ids = [Row(number, name) for name, number in pairs if type(number) is int]  # not isinstance: True is an int
            for rows in (names, ids):
                if len(rows) == len(entries):
                    return rows
        case [str(), *_] if all(type(name) is str for name in value):
            return _numbered(value)
        case [{}, *_] if all(type(row) is dict for row in value):
            return [_detailed(path, row) for row in value]
    raise DataError(f"{path} is not a class list", 'expected {"1": "cat", "2": "dog"} or a list of names')


def _detailed(path: Path, row: Mapping[str, object]) -> Row:
    known = ("id", "name", "kind", "color")
    for key in row:
        if key not in known:
            raise DataError(f"{path}: unknown key '{key}' in a class", nearest(key, known))
    number, name, given, color = (row.get(key) for key in known)
    if type(number) is not int or type(name) is not str:
        raise DataError(f"{path}: a class needs an integer 'id' and a text 'name', found {json.dumps(row)}", _HELP)
    kinds: tuple[Kind, ...] = get_args(Kind)
    kind = next((kind for kind in kinds if kind == ("thing" if given is None else given)), None)
    if kind is None:
        raise DataError(f"{path}: unknown kind '{given}' of class '{name}'", nearest(str(given), kinds))
    match color:
        case None:
            return Row(number, name, kind)
        case [int(r), int(g), int(b)] if all(0 <= part <= 255 for part in (r, g, b)):
            return Row(number, name, kind, (r, g, b))
    raise DataError(f"{path}: the colour of class '{name}' is not three numbers in 0..255", "for example [255, 0, 0]")
