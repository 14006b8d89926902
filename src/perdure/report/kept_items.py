"""Kept items as a report shows them: pictures by class, and whether a synthetic image may be a copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from perdure.errors import DataError
from perdure.files import read_tensors
from perdure.kept.ledger import LEDGER, is_raw, read_ledger, run_of, shows_few
from perdure.report.plots import Strip, strips
from perdure.report.render import Thumb, hex_color, thumbnail
from perdure.streams.description import DescribedStream

MOST_PICTURES: Final = 12
MOST_STAGES: Final = 4
"""Earlier tasks whose synthetic pictures are shown beside those of the last one."""
_DAMAGED: Final = "the file was changed or is damaged, or the method's kept items are not as perdure.kept.items says"
Distances = npt.NDArray[np.float64]
TERMS: Final[tuple[dict[str, str], ...]] = (
    {
        "name": "nearest",
        "title": "distance to the nearest training image",
        "meaning": "Root-mean-square difference of grey values (0 to 1) over all pixels and channels between a "
        "synthetic image and that training image of its class to which it comes closest. Between training images: the "
        "same from a training image to the nearest other one of its class. Measured by the method while the training "
        "data was open.",
        "facts": "unit grey values · 0 to 1 · 0 is an exact copy",
    },
    {
        "name": "possible-copy",
        "title": "possible copy",
        "meaning": "A synthetic image that is closer to a training image than any two training images of the class are "
        "to each other, or that is equal to one. No mark is no proof: a shifted or recoloured copy is far away by this "
        "distance.",
        "facts": "marked ▲",
    },
)


class KeptItem(BaseModel):
    """A kept item of one task: what the ledger says of it, and its file if a report shows what is in it.

    ``few``: it holds averages of so few images of patients that they are pictures of them; no page shows these.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    kind: str
    bytes: int
    made_from: str
    patient_data: bool = False
    per_class_bytes: int | None = None
    shows: str | None = None
    raw: bool = False
    few: bool = False
    files: int = 1
    sha256: str = ""
    path: Path = Path()


@dataclass(frozen=True, slots=True)
class Column:
    """One tensor of pictures: its heading and the item that it belongs to."""

    title: str
    item: KeptItem


@dataclass(frozen=True, slots=True)
class PictureRow:
    """One class: pictures by column, and how many more there are than are shown."""

    name: str
    color: str
    taught: str
    first: bool
    cells: tuple[tuple[tuple[Thumb, ...], int], ...]


@dataclass(frozen=True)
class Nearness:
    """Distances of one class; ``None`` where nothing was measured.

    Args:
        name: The class.
        color: Its colour.
        made: Number of synthetic images that were measured.
        made_least: Smallest of their distances.
        made_median: Median.
        real: Number of training images that were measured.
        real_least: Smallest distance between two of them.
        real_median: Median distance to the nearest other one.
        copies: Number of synthetic images that may be copies.
    """

    name: str
    color: str
    made: int
    made_least: float | None
    made_median: float | None
    real: int
    real_least: float | None
    real_median: float | None
    copies: int

    @property
    def ratios(self) -> tuple[float | None, float | None]:
        """Smallest and median distance of synthetic images in units of those among training images."""
        pairs = ((self.made_least, self.real_least), (self.made_median, self.real_median))
        least, median = (None if made is None or not real else made / real for made, real in pairs)
        return least, median


@dataclass(frozen=True)
class Measured:
    """Distances of one item: rows, plot, sums over the classes; in ``twins`` two training images are equal."""

    item: KeptItem
    rows: list[Nearness]
    svg: str
    made: int
    copies: int
    twins: list[str]


def read_items(folder: Path) -> tuple[KeptItem, ...]:
    """Items of a task's ledger in its order; of one that lies in a single file, the file's hash.

    Raises:
        DataError: The ledger is missing or damaged, or an item that says how it is shown is not in a ``kept/``.
    """
    found, ledger = [], read_ledger(folder)
    for entry in ledger["items"]:
        places = {PurePosixPath(tensor["file"]) for tensor in entry["tensors"]}
        # a changed ledger must not make the page show other files of the machine
        if entry["shows"] and (len(places) != 1 or next(iter(places)).parts[2:-1] != ("kept",)):
            raise DataError(f"{folder / LEDGER}: item '{entry['name']}' is not in kept/", _DAMAGED)
        found.append(
            KeptItem(
                name=entry["name"],
                kind=entry["kind"],
                bytes=entry["bytes"],
                made_from=entry["made_from"],
                patient_data=entry["patient_data"],
                per_class_bytes=entry["per_class_bytes"],
                shows=entry["shows"],
                raw=entry["patient_data"] or is_raw(entry),
                few=shows_few(entry, ledger["min_images"]),
                files=len(entry["files"]),
                sha256=entry["files"][0]["sha256"] if len(entry["files"]) == 1 else "",
                path=run_of(folder) / places.pop() if entry["shows"] else Path(),
            )
        )
    return tuple(found)


def with_stages(shown: Mapping[int, Sequence[KeptItem]], stream: DescribedStream) -> tuple[KeptItem, ...]:
    """What is kept now, and before it the synthetic pictures of a few earlier tasks, which show how they change.

    Args:
        shown: Items that may be shown, by task.
        stream: Whose tasks these are.
    """
    *earlier, last = sorted(shown) or [-1]
    made = {t: [i for i in shown[t] if i.kind == "synthetic" and i.shows == "images"] for t in earlier}
    past = [t for t in earlier if made[t]]
    # evenly spread, the first among them
    chosen = past[:: -(-len(past) // MOST_STAGES)] if past else []

    def after(task: int, item: KeptItem) -> KeptItem:
        return item.model_copy(update={"name": f"{item.name} after {stream.tasks[task].spoken}"})

    before = [after(t, item) for t in chosen for item in made[t]]
    now = [
        after(last, i) if before and i.kind == "synthetic" and i.shows == "images" else i for i in shown.get(last, ())
    ]
    return (*before, *now)


def picture_rows(stream: DescribedStream, items: Sequence[KeptItem]) -> tuple[list[Column], list[PictureRow]]:
    """Pictures of items that show images: a column per tensor in ledger order, a row per class in learning order.

    Raises:
        DataError: A tensor is not uint8 ``(K, C, H, W)`` or ``(K, n, C, H, W)`` with at most as many rows as classes.
    """
    from PIL import Image

    columns: list[Column] = []
    parts: list[list[tuple[tuple[Thumb, ...], int]]] = []
    for item in items:
        tensors = read_tensors(item.path) if item.shows == "images" else {}
        for key in sorted(tensors):
            tensor = tensors[key].numpy()
            many = tensor[:, None] if tensor.ndim == 4 else tensor
            fits = many.ndim == 5 and len(many) <= len(stream.order) and all(many.shape[2:])
            if tensor.dtype != np.uint8 or not fits:
                raise DataError(
                    f"{item.path}: tensor '{key}' ({tensor.dtype}, {tensor.shape}) does not hold pictures of "
                    f"{len(stream.order)} classes",
                    _DAMAGED,
                )
            title = item.name if len(tensors) == 1 else f"{item.name}: {key.rpartition('.')[2]}"
            columns.append(Column(title, item))
            # one channel is grey; of other counts than three the first stands for all
            rgb = many if many.shape[2] == 3 else np.repeat(many[:, :, :1], 3, axis=2)
            pictures = np.ascontiguousarray(rgb[:, :MOST_PICTURES].transpose(0, 1, 3, 4, 2))
            thumbs = [tuple(thumbnail(Image.fromarray(one)) for one in row) for row in pictures]
            parts.append([(row, max(0, many.shape[1] - MOST_PICTURES)) for row in thumbs])
    rows = []
    for k, c in enumerate(stream.order):
        cells = tuple(part[k] if k < len(part) else ((), 0) for part in parts)
        if any(thumbs for thumbs, _ in cells):
            group = stream.group_of(c)
            taught = "" if stream.merged else stream.tasks[group].spoken
            color = hex_color(stream.space[c].color)
            rows.append(PictureRow(stream.space.name(c), color, taught, stream.groups[group][0] == c, cells))
    return columns, rows


def what_they_are(stream: DescribedStream, items: Sequence[KeptItem]) -> str:
    """One line that says plainly what the pictures are."""
    if any(item.raw for item in items if item.shows == "images"):
        return "Some of these are raw training images, as the ledger says; the others the method computed."
    if stream.patients:
        return (
            "The data set's images come from patients; these pictures are not images of single patients but what the "
            "method computed. An average of few images, or a synthetic picture, can still resemble one."
        )
    return "The method computed these, as the ledger says; none is a training or test image as it was read."


def memorisation(stream: DescribedStream, items: Sequence[KeptItem]) -> list[Measured]:
    """Is a synthetic image a copy? One table and plot for each item that shows distances.

    A synthetic image may be a copy where it is closer to a training image than the closest two training images are to
    each other, or at no distance at all.

    Raises:
        DataError: An item's tensors are not ``impressions (K, n)`` and ``reference (K, m)`` with at most as many rows
            as there are classes.
    """
    measured = []
    for item in items:
        if item.shows != "distances":
            continue
        rows, bars = [], []
        # a run that is partly done has measured the first classes only, so there may be fewer rows than classes
        for c, made, real in zip(stream.order, *_distances(item, len(stream.order)), strict=False):
            copies = (made < (real[0] if len(real) else 0.0)) | (made == 0)
            (made_least, made_median), (real_least, real_median) = (
                (float(v[0]), float(np.median(v))) if len(v) else (None, None) for v in (made, real)
            )
            name, color = stream.space.name(c), hex_color(stream.space[c].color)
            rows.append(
                Nearness(
                    name, color, len(made), made_least, made_median, len(real), real_least, real_median,
                    int(copies.sum()),
                )
            )  # fmt: skip
            bars.append(Strip(name, tuple(made), tuple(copies), tuple(real)))
        svg = strips(f"distances-{item.name}", bars, "root-mean-square distance in grey values (0 to 1)")
        twins = [row.name for row in rows if row.real_least == 0]
        made_all, copies_all = sum(row.made for row in rows), sum(row.copies for row in rows)
        measured.append(Measured(item, rows, svg, made_all, copies_all, twins))
    return measured


def _distances(item: KeptItem, classes: int) -> tuple[list[Distances], list[Distances]]:
    """Sorted finite distances of each class: of synthetic images, and among training images."""
    tensors = {key.rpartition(".")[2]: t.double().numpy() for key, t in read_tensors(item.path).items()}
    both = [tensors[key] for key in ("impressions", "reference") if key in tensors]
    if len(both) != 2 or any(t.ndim != 2 or not 0 < len(t) <= classes for t in both) or len(both[0]) != len(both[1]):
        raise DataError(
            f"{item.path} does not hold distances of {classes} classes",
            "it must hold the tensors impressions (classes, n) and reference (classes, m)",
        )
    impressions, reference = ([np.sort(row[np.isfinite(row)]) for row in tensor] for tensor in both)
    return impressions, reference
