"""Classes, label spaces and the look-up tables between them.

A label is the *global id* of a class everywhere: on disk after a reader, in a batch, in a result file. A
network channel is never a label; :class:`ChannelMap` is the only bridge between the two.
"""

from __future__ import annotations

import colorsys
import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from perdure.errors import DataError, UsageError, nearest, odd, plain

BACKGROUND: Final = 0
TABLE_SIZE: Final = 4096
"""Length of every table that is indexed by a label. Whole-body sets have up to 345 classes."""
IGNORE: Final = TABLE_SIZE - 1
"""Label of pixels that count nowhere. The last entry of each table, so that a look-up needs no special case."""
IGNORE_IN_FILES: Final = 255
"""What 8-bit masks hold where labels are to be ignored, by the custom of the published data sets."""

LONGEST_NAME: Final = 120
"""Characters of a class name: it is a column in tables and a label in plots."""

Kind = Literal["thing", "stuff", "organ", "station", "lesion"]
Table = npt.NDArray[np.int16]
"""Label -> label, ``(TABLE_SIZE,)``."""
Palette = npt.NDArray[np.uint8]
"""Label -> RGB, ``(TABLE_SIZE, 3)``."""
Color = tuple[int, int, int]
_COLORS: Final = (
    "07a af0 e00 00b 2bf 800 70e 8b6 144 a6e 0e9 517 b77 dc4 349 f7c 083 747 e1c f80 9ce b48 afa 7aa 754 83b "
    "fac 476 b2f 805 0b2 67c a20 da9 79f d16 0ff 98a ee7 808 a96 8ad fc7 d89 594 346 c2a 51c 623 7eb b52 f97 "
    "5ca 253 409 d9f f15 74d c7c f48 833 d6e b08 fca 6c4 b25 13a 95a 0e6 2c8 b5c be4 0dc f19 749 570 397 f61 "
    "66d 835 ade 97b 75b b9c 46f 874 366 aa4 606 02d 702 637 54c c11 726 54a 8fc bbf a69 88e 0ef 7bd 70b a7d "
    "d8b fa4 dc8 dbd 33f f2b 87f 385 714 47b 757 dab a49 273 535 d08 cd0 21a 911 d46 b80 a79 99d f45 646 6df "
    "f68 048 8f6 f88 855 9e8 339 722 aee f8e 698 ac9 a86 d79 744 ebb d33 aae 437 a57 b4e 63d fa8 7ba 93e af8"
)
"""Colours as three hexadecimal digits.

Each was chosen as the one of 16³ that is farthest from all before it, from black (background) and from the grey of
ignore, in OKLab as seen with normal sight, protanopia and deuteranopia (Machado, Oliveira and Fernandes 2009); the two
before it counted double. Hues at a golden angle put classes 3 and 8 at no distance for a deuteranope.
"""

MACHINE_PATH: Final = re.compile(
    r"file://[^\s\"'<>]+"
    # a slash, two names or more; not the end of a URL, of a tag, of a relative path or of a fraction
    r"|(?<![\w.:/<~…-])/(?:[\w.+@-]+/)+[\w.+@-]*"
    # a drive, and a server; in JSON each backslash stands twice
    r"|(?<!\w)[A-Za-z]:\\{1,2}\w[^\s\"'<>]*"
    r"|(?<!\\)\\{2,4}[\w.-]+\\{1,2}[\w.-]+"
)
"""What the audit takes for a path of a machine in any text of a run."""
_PLACE: Final = re.compile(r"[/~]|[A-Za-z]:[\\/]|(.*[\\/])?\.\.([\\/]|$)")
"""How a name begins that is meant as a place of a file, though no audit would find it."""


def wrong_name(name: str) -> str:
    """What is wrong with a class name, in words; empty for a sound one.

    A name stays in a run for ever, so one that would make every audit fail must not come in. Texts of a run hold it as
    it is, in JSON and in HTML.
    """
    if any(map(odd, name)):
        return f"the name '{plain(name)[:60]}' holds a control character"
    if len(name) > LONGEST_NAME:
        return f"the name '{name[:30]}…' has {len(name)} characters, and {LONGEST_NAME} are the most"
    written = name, json.dumps(name, ensure_ascii=False), html.escape(name)
    if _PLACE.match(name) or any(map(MACHINE_PATH.search, written)):
        return f"the name '{name[:60]}' looks like a path"
    return "" if name.strip() else "a name is empty"


@dataclass(frozen=True, slots=True)
class ClassInfo:
    """One class: a stable global id in 1..4094, a name, a kind and a colour (RGB, 0..255)."""

    id: int
    name: str
    kind: Kind = "thing"
    color: Color = (0, 0, 0)


@dataclass(frozen=True)
class LabelSpace:
    """All foreground classes of a data set, and what label 0 means there.

    Args:
        classes: Foreground classes; ids unique, names unique, 1 <= id <= 4094.
        background: Name of label 0, or ``None`` where every pixel of the data set has a class (figures then
            leave label 0 out).

    Raises:
        UsageError: An id or a name occurs twice, an id is out of range, or a name is none (:func:`wrong_name`).
    """

    classes: tuple[ClassInfo, ...]
    background: str | None = "background"
    _by_id: dict[int, ClassInfo] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_id = {c.id: c for c in self.classes}
        if len(by_id) != len(self.classes) or len({c.name for c in self.classes}) != len(self.classes):
            raise UsageError("a class id or a class name occurs twice in the class list")
        bad = [c.id for c in self.classes if not BACKGROUND < c.id < IGNORE]
        if bad:
            raise UsageError(f"class id {bad[0]} is out of range", f"ids run from 1 to {IGNORE - 1}; 0 is background")
        if problem := next(
            filter(None, (wrong_name(name) for name in (*(c.name for c in self.classes), self[0].name))), ""
        ):
            raise UsageError(f"class list: {problem}", "shorten or correct the name")
        object.__setattr__(self, "_by_id", by_id)  # the class is frozen

    @property
    def ids(self) -> tuple[int, ...]:
        """Foreground ids in the order of the class list."""
        return tuple(c.id for c in self.classes)

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, class_id: int) -> ClassInfo:
        if class_id == BACKGROUND:
            return ClassInfo(BACKGROUND, self.background or "unlabelled", "stuff")
        return self._by_id[class_id]

    def name(self, class_id: int) -> str:
        """Name of a class id; 0 gives the background's name."""
        return self[class_id].name

    def id_of(self, name: str) -> int:
        """Global id of a class name. Raises :class:`UsageError` with the nearest name."""
        for c in self.classes:
            if c.name == name:
                return c.id
        raise UsageError(f"unknown class '{name}'", nearest(name, (c.name for c in self.classes)))

    def palette(self) -> Palette:
        """RGB table ``(TABLE_SIZE, 3)`` uint8 for painting label maps: ignore is light grey, other labels are black."""
        table = np.zeros((TABLE_SIZE, 3), np.uint8)
        for c in self.classes:
            table[c.id] = c.color
        table[IGNORE] = (224, 224, 224)
        return table


def remap_table(keep: Iterable[int], other: int) -> Table:
    """Table that keeps ``keep``, background and ignore and turns every other label into ``other``."""
    table = np.full(TABLE_SIZE, other, np.int16)
    kept = [BACKGROUND, IGNORE, *keep]
    table[kept] = kept
    return table


@dataclass(frozen=True)
class ChannelMap:
    """Which network channel stands for which class: channel k is class ``ids[k]``.

    Networks have one channel per foreground class in the order in which classes were learned. Raises
    :class:`UsageError` if an id occurs twice.
    """

    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(set(self.ids)) != len(self.ids):
            raise UsageError("a class occurs twice in the class order")

    def to_channel(self) -> npt.NDArray[np.int64]:
        """Table ``(TABLE_SIZE,)``: label -> channel; labels without a channel (background, ignore, others) -> -1."""
        table = np.full(TABLE_SIZE, -1, np.int64)
        table[list(self.ids)] = np.arange(len(self.ids))
        return table


def spread_colors(count: int) -> list[Color]:
    """Return ``count`` well separated RGB colours, the same each time; the first ones are those of any longer list.

    They differ for colour-blind readers too, neighbours in the list most of all.
    """
    colors: list[Color] = [(17 * int(c[0], 16), 17 * int(c[1], 16), 17 * int(c[2], 16)) for c in _COLORS.split()]
    known = set(colors)
    for k in range(2 * count if count > len(colors) else 0):  # more than any eye can part: still no two alike
        r, g, b = colorsys.hls_to_rgb((k * 0.61803398875) % 1.0, (0.45, 0.62, 0.35)[k % 3], 0.72)
        color = (round(r * 255), round(g * 255), round(b * 255))
        colors += [color] * (color not in known)
        known.add(color)
    return colors[:count]


def label_space(names: Sequence[str], kind: Kind = "thing", background: str | None = "background") -> LabelSpace:
    """Label space with ids 1.. in the order of ``names`` and generated colours. Empty list is a DataError."""
    if not names:
        raise DataError("the class list is empty")
    colors = spread_colors(len(names))
    return LabelSpace(
        tuple(ClassInfo(i + 1, n, kind, c) for i, (n, c) in enumerate(zip(names, colors, strict=True))),
        background,
    )
