"""Predictions for image files: label maps as PNG, and a table of classes as CSV."""

from __future__ import annotations

import csv
import errno
import io
import os
import struct
import unicodedata
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from perdure.errors import DataError
from perdure.files import refuse_special, write_atomic, write_failure, write_text
from perdure.labels import IGNORE_IN_FILES, LabelSpace

FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")
"""Spreadsheets take a cell that begins with one of these for a formula and compute it."""


def write_masks(out: Path, stem: str, labels: npt.NDArray[np.int16], space: LabelSpace, largest: int) -> list[Path]:
    """Write a label map twice: ``out/index/STEM.png`` (class ids) and ``out/color/STEM.png`` (class colours).

    The index file is 8-bit grey and the colour file a palette PNG with the same indices while ``largest`` is at most
    254, because readers take 255 for ignore; beyond that they are 16-bit grey and RGB.

    Args:
        out: Folder for both.
        stem: Name of the files without suffix.
        labels: Global ids ``(H, W)``.
        space: The classes, for their colours.
        largest: Largest id that the model may predict, so that all masks of one model have one format.

    Raises:
        PerdureError: The disk is full or ``out`` cannot be written.
    """
    palette = space.palette()
    if largest < IGNORE_IN_FILES:
        index = Image.fromarray(labels.astype(np.uint8))
        color = index.copy()
        color.putpalette(palette[:256].tobytes())  # a palette PNG has 256 entries at most
    else:
        index, color = Image.fromarray(labels.astype(np.uint16)), Image.fromarray(palette[labels])
    written = []
    for folder, picture in (("index", index), ("color", color)):
        target = out / folder / f"{stem}.png"
        write_png(target, picture)
        written.append(target)
    return written


def open_picture(path: Path) -> Image.Image:
    """Read a picture that a run wrote. Raises DataError where it is damaged."""
    refuse_special(path)
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except (OSError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path} is not a readable picture: {error}", "restore it, or delete it: pages are then written without it"
        ) from error


def write_png(path: Path, picture: Image.Image, optimize: bool = False) -> None:
    """Write a PNG atomically; ``optimize`` makes it as small as it gets, which takes seconds for large photographs.

    Raises:
        PerdureError: The disk is full or the folder cannot be written.
    """

    def fill(part: Path) -> None:
        picture.save(part, "PNG", optimize=optimize)

    write_atomic(path, fill)


def write_predictions(
    path: Path, rows: Iterable[tuple[str, Mapping[int, float]]], space: LabelSpace, ids: Sequence[int]
) -> None:
    """Write a table with a line per image: ``file``, ``class_id``, ``class``, ``probability``, ``p(NAME)`` per class.

    No cell can be taken for a formula: see :func:`table_names` for files; a class name that begins like a formula
    gets an apostrophe before it.

    Args:
        path: The CSV file.
        rows: Name of an image (see :func:`table_names`) and the probability of each class by id; of equal
            probabilities the first is the prediction.
        space: The classes, for their names.
        ids: Order of the columns ``p(NAME)``.

    Raises:
        PerdureError: The disk is full or the folder cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "class_id", "class", "probability", *(f"p({space.name(c)})" for c in ids)])
    for name, scores in rows:
        best = max(scores, key=scores.__getitem__)
        label = space.name(best)
        label = f"'{label}" if label.startswith(FORMULA) else label
        writer.writerow([name, best, label, *(f"{scores[c]:.6f}" for c in (best, *ids))])
    write_text(path, text.getvalue())


def table_names(paths: Sequence[Path]) -> list[str]:
    """Names of images in a table: their paths from the folder that all of them lie in, with forward slashes.

    Names differ where files differ. One that a spreadsheet would take for a formula begins with ``./``, so that it
    is still the path of the file.

    Raises:
        DataError: A name is not UTF-8 text or holds control characters.
    """
    whole = [path.parent.resolve() / path.name for path in paths]
    top = os.path.commonpath([path.parent for path in whole])
    names = [path.relative_to(top).as_posix() for path in whole]
    for name in names:
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):  # controls, bytes that are not UTF-8
            shown = os.fsencode(name).decode(errors="backslashreplace")
            shown = "".join(repr(c)[1:-1] if unicodedata.category(c) == "Cc" else c for c in shown)
            raise DataError(f"the file name {shown} is not plain UTF-8 text", "rename the file")
    return [f"./{name}" if name.startswith(FORMULA) else name for name in names]


def refuse_unwritable(out: Path) -> None:
    """Raise PerdureError where ``out`` cannot be written: before hours of work, not after them."""
    place = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not place.is_dir():
        raise write_failure(out, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if not os.access(place, os.W_OK):
        raise write_failure(out, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
