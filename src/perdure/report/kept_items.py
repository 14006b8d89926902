"""Kept items that the report shows: pictures by class, and distances to the nearest training image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from perdure.errors import DataError
from perdure.files import read_tensors
from perdure.kept.audit import is_raw
from perdure.kept.ledger import Ledger, run_of
from perdure.report.colors import hex_color
from perdure.report.render import Thumb, thumbnail
from perdure.streams.description import DescribedStream

MOST_PICTURES: Final = 12
_DAMAGED: Final = "the file was changed or is damaged, or the method's kept items are not as perdure.kept.items says"


@dataclass(frozen=True, slots=True)
class ShownItem:
    """A kept item of one task: what the ledger says of it, and its file."""

    name: str
    kind: str
    shows: str
    bytes: int
    made_from: str
    raw: bool
    path: Path


@dataclass(frozen=True, slots=True)
class Column:
    """One tensor of pictures: its heading and the item that it belongs to."""

    title: str
    item: ShownItem


@dataclass(frozen=True, slots=True)
class PictureRow:
    """One class: pictures by column, and how many more there are than are shown."""

    name: str
    color: str
    taught: str
    first: bool
    cells: tuple[tuple[tuple[Thumb, ...], int], ...]


def shown_items(folder: Path, ledger: Ledger) -> tuple[ShownItem, ...]:
    """Items of a task's ledger that say how they are shown, in its order. Raises DataError for a strange place."""
    found = []
    for entry in ledger["items"]:
        if entry["shows"] is None:
            continue
        places = {t["file"] for t in entry["tensors"]}
        if len(places) != 1 or PurePosixPath(next(iter(places))).parts[2:-1] != ("kept",):
            raise DataError(f"{folder / 'ledger.json'}: item '{entry['name']}' is not in kept/", _DAMAGED)
        about = (entry["name"], entry["kind"], entry["shows"], entry["bytes"], entry["made_from"])
        raw = entry["patient_data"] or is_raw(entry)
        found.append(ShownItem(*about, raw, run_of(folder) / places.pop()))
    return tuple(found)


def picture_rows(stream: DescribedStream, items: Sequence[ShownItem]) -> tuple[list[Column], list[PictureRow]]:
    """Pictures of items that show images: a column a tensor in ledger order, a row a class in learning order.

    Raises:
        DataError: A tensor is not uint8 ``(K, C, H, W)`` or ``(K, n, C, H, W)`` with at most as many rows as classes.
    """
    columns: list[Column] = []
    parts: list[list[tuple[tuple[Thumb, ...], int]]] = []
    for item in items:
        if item.shows != "images":
            continue
        tensors = read_tensors(item.path)
        for key in sorted(tensors):
            title = item.name if len(tensors) == 1 else f"{item.name}: {key.rpartition('.')[2]}"
            columns.append(Column(title, item))
            parts.append([_thumbs(row) for row in _pictures(item, key, tensors[key].numpy(), len(stream.order))])
    colors = {c.id: hex_color(c.color) for c in stream.classes}
    rows = []
    for k, c in enumerate(stream.order):
        cells = tuple(part[k] if k < len(part) else ((), 0) for part in parts)
        if any(thumbs for thumbs, _ in cells):
            group = stream.group_of(c)
            taught = "" if stream.merged else stream.tasks[group].name
            rows.append(PictureRow(stream.names[c], colors[c], taught, stream.groups[group][0] == c, cells))
    return columns, rows


def _pictures(item: ShownItem, key: str, tensor: npt.NDArray[Any], classes: int) -> npt.NDArray[np.uint8]:
    """``(K, n, C, H, W)``, or DataError."""
    many = tensor[:, None] if tensor.ndim == 4 else tensor
    if tensor.dtype != np.uint8 or many.ndim != 5 or len(many) > classes or not all(many.shape[2:]):
        raise DataError(
            f"{item.path}: tensor '{key}' ({tensor.dtype}, {tensor.shape}) does not hold pictures of {classes} classes",
            _DAMAGED,
        )
    return many


def _thumbs(pictures: npt.NDArray[np.uint8]) -> tuple[tuple[Thumb, ...], int]:
    """The first few of one class's pictures ``(n, C, H, W)``, and the number of the others."""
    from PIL import Image

    rgb = pictures if pictures.shape[1] == 3 else np.repeat(pictures[:, :1], 3, axis=1)
    images = [Image.fromarray(np.ascontiguousarray(p.transpose(1, 2, 0))) for p in rgb[:MOST_PICTURES]]
    return tuple(thumbnail(image) for image in images), max(0, len(pictures) - MOST_PICTURES)


def what_they_are(stream: DescribedStream, items: Sequence[ShownItem]) -> str:
    """One line that says plainly what the pictures are."""
    shown = [item for item in items if item.shows == "images"]
    if any(item.raw for item in shown):
        return "Some of these are raw training images, as the ledger says; the others the method computed."
    text = "The method computed these, as the ledger says; none is a training or test image as it was read."
    if stream.patients:
        text = (
            "The data set's images come from patients; these pictures are not images of single patients but what the "
            "method computed. An average of few images, or a synthetic picture, can still resemble one."
        )
    return text
