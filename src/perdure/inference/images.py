"""Image files in, masks or a table of classes out."""

from __future__ import annotations

import csv
import errno
import io
import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from PIL import Image

from perdure.data.readers.imagefiles import IMAGE_SUFFIXES, read_image
from perdure.errors import DataError
from perdure.files import write_atomic, write_failure, write_json, write_text
from perdure.inference.trained import Trained
from perdure.labels import LabelSpace

FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")
"""Spreadsheets take a cell that begins with one of these for a formula and compute it."""


def find_images(inputs: Iterable[Path]) -> list[Path]:
    """Image files among files and folders (searched without going deeper), sorted within each folder.

    Raises:
        DataError: A path does not exist, cannot be read, is no image or is given twice, or nothing was found.
    """
    places = list(inputs)
    found: list[Path] = []
    for path in places:
        if path.is_dir():
            found += _images_in(path)
        elif not path.exists():
            raise DataError(f"{path} does not exist", "give image files, or folders that hold some")
        elif path.suffix.lower() not in IMAGE_SUFFIXES:
            raise DataError(f"{path} is not an image that can be read", f"readable: {', '.join(IMAGE_SUFFIXES)}")
        else:
            found.append(path)
    if not found:
        where = f" in {places[0]}" if len(places) == 1 else f" in {len(places)} folders" if places else ""
        raise DataError(f"no images found{where}", f"looked for {', '.join(IMAGE_SUFFIXES)}, not in folders inside")
    known: set[Path] = set()
    for path in found:
        if _whole(path) in known:
            raise DataError(f"{path} is given twice", "name each image once, by itself or by its folder")
        known.add(_whole(path))
    return found


def _images_in(folder: Path) -> list[Path]:
    try:
        inside = [path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file()]
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be read: {error.strerror}", "check who may read it") from error
    return sorted(path for path in inside if path.suffix.lower() in IMAGE_SUFFIXES)


def _whole(path: Path) -> Path:
    """Absolute path; a link to a file keeps its own name, which may be why it is there."""
    return path.parent.resolve() / path.name


def predict_images(model: Trained, inputs: Iterable[Path], out: Path, done: Callable[[int, int], None]) -> list[Path]:
    """Segment images: ``out/index/NAME.png`` (class ids), ``out/color/NAME.png`` (palette), ``out/classes.json``.

    Args:
        model: The model.
        inputs: Image files and folders.
        out: Folder for the masks.
        done: Called with the number of finished images and of all images.

    Returns:
        The masks, two an image.

    Raises:
        DataError: See :func:`find_images`; two images would have one mask; or a file is damaged, transparent or has
            more than 8 bits a channel: the masks of the images before it are there, of it and those after it nothing.
        PerdureError: The disk is full or ``out`` cannot be written.
    """
    paths = find_images(inputs)
    refuse_same_mask(paths)
    palette = model.space.palette().flatten().tolist()
    written: list[Path] = []
    for number, path in enumerate(paths, 1):
        labels = model.segment(read_image(path).transpose(1, 2, 0))
        if number == 1:
            write_json(out / "classes.json", model.classes())
        index = Image.fromarray(labels)
        color = index.copy()
        color.putpalette(palette)
        for folder, picture in (("index", index), ("color", color)):
            target = out / folder / f"{path.stem}.png"
            write_atomic(target, lambda part, p=picture: p.save(part, "PNG"))  # type: ignore[misc]
            written.append(target)
        done(number, len(paths))
    return written


def refuse_same_mask(paths: Sequence[Path]) -> None:
    """Raise DataError if the masks of two images would be one file."""
    first: dict[str, Path] = {}
    for path in paths:
        if path.stem in first:
            raise DataError(
                f"{first[path.stem]} and {path} would both be written as {path.stem}.png",
                "rename one, or use two folders",
            )
        first[path.stem] = path


def classify_images(model: Trained, inputs: Iterable[Path], out: Path, done: Callable[[int, int], None]) -> Path:
    """Classify images: ``out/predictions.csv`` and ``out/classes.json``, both written when all images are done.

    The table has a line an image: ``file`` (see :func:`table_names`), ``class_id``, ``class``, ``probability`` of that
    class, and ``p(NAME)`` for every class learned so far, in the order of their ids. No cell can be taken for a
    formula: see :func:`table_names` for files; a class name that begins like one has an apostrophe before it.

    Args:
        model: The model.
        inputs: Image files and folders.
        out: Folder for the table.
        done: Called with the number of finished images and of all images.

    Returns:
        The table.

    Raises:
        DataError: See :func:`find_images`; or a file is damaged, transparent or has more than 8 bits a channel:
            nothing is written then.
        PerdureError: The disk is full or ``out`` cannot be written.
    """
    paths = find_images(inputs)
    names = table_names(paths)
    _refuse_unwritable(out)
    ids = sorted(model.seen)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "class_id", "class", "probability", *(f"p({model.space.name(c)})" for c in ids)])
    for number, (path, name) in enumerate(zip(paths, names, strict=True), 1):
        scores = model.classify(read_image(path).transpose(1, 2, 0))
        best = max(scores, key=scores.__getitem__)
        chances = [f"{scores[c]:.6f}" for c in (best, *ids)]
        writer.writerow([name, best, _class_cell(model.space, best), *chances])
        done(number, len(paths))
    write_json(out / "classes.json", model.classes())
    write_text(out / "predictions.csv", text.getvalue())
    return out / "predictions.csv"


def table_names(paths: Sequence[Path]) -> list[str]:
    """Names of images in a table: their paths from the folder that all of them lie in, with forward slashes.

    Names differ where files differ. One that a spreadsheet would take for a formula begins with ``./``, so that it
    is still the path of the file.

    Raises:
        DataError: A name is not UTF-8 text or holds control characters.
    """
    whole = [_whole(path) for path in paths]
    top = os.path.commonpath([path.parent for path in whole])
    names = [path.relative_to(top).as_posix() for path in whole]
    for name in names:
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):  # controls, bytes that are not UTF-8
            shown = os.fsencode(name).decode(errors="backslashreplace")
            shown = "".join(repr(c)[1:-1] if unicodedata.category(c) == "Cc" else c for c in shown)
            raise DataError(f"the file name {shown} is not plain UTF-8 text", "rename the file")
    return [f"./{name}" if name.startswith(FORMULA) else name for name in names]


def _class_cell(space: LabelSpace, class_id: int) -> str:
    name = space.name(class_id)
    return f"'{name}" if name.startswith(FORMULA) else name


def _refuse_unwritable(out: Path) -> None:
    """Raise PerdureError where ``out`` cannot be written, before hours of work and not after them."""
    place = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not place.is_dir():
        raise write_failure(out, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if not os.access(place, os.W_OK):
        raise write_failure(out, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
