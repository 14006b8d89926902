"""Is a synthetic image a copy? Distances to the nearest training image, held against those among training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from perdure.errors import DataError
from perdure.files import read_tensors
from perdure.report.colors import hex_color
from perdure.report.kept_items import ShownItem
from perdure.report.plots import Strip, strips
from perdure.streams.description import DescribedStream

Distances = npt.NDArray[np.float32]
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
    def ratio_least(self) -> float | None:
        """Smallest distance of a synthetic image in units of the smallest one among training images."""
        return _ratio(self.made_least, self.real_least)

    @property
    def ratio_median(self) -> float | None:
        """The same of the medians."""
        return _ratio(self.made_median, self.real_median)


def memorisation(stream: DescribedStream, items: Sequence[ShownItem]) -> list[dict[str, Any]]:
    """One table and plot for each item that shows distances.

    Raises:
        DataError: An item's tensors are not ``impressions (K, n)`` and ``reference (K, m)`` with at most as many rows
            as there are classes.
    """
    made = []
    for item in items:
        if item.shows == "distances":
            impressions, reference = _read(item, len(stream.order))
            rows = [_row(stream, k, impressions[k], reference[k]) for k in range(len(impressions))]
            bars = [_strip(row, impressions[k], reference[k]) for k, row in enumerate(rows)]
            svg = strips(f"distances-{item.name}", bars, "root-mean-square distance in grey values (0 to 1)")
            copies = sum(row.copies for row in rows)
            twins = [row.name for row in rows if row.real_least == 0]
            made.append({"item": item, "rows": rows, "svg": svg, "copies": copies, "twins": twins,
                         "made": sum(row.made for row in rows)})  # fmt: skip
    return made


def _read(item: ShownItem, classes: int) -> tuple[Distances, Distances]:
    tensors = {key.rpartition(".")[2]: t.float().numpy() for key, t in read_tensors(item.path).items()}
    both = [tensors[key] for key in ("impressions", "reference") if key in tensors]
    if len(both) != 2 or any(t.ndim != 2 or not 0 < len(t) <= classes for t in both) or len(both[0]) != len(both[1]):
        raise DataError(
            f"{item.path} does not hold distances of {classes} classes",
            "it must hold the tensors impressions (classes, n) and reference (classes, m)",
        )
    return both[0], both[1]


def _row(stream: DescribedStream, k: int, impressions: Distances, reference: Distances) -> Nearness:
    color = next(hex_color(c.color) for c in stream.classes if c.id == stream.order[k])
    made, real = _known(impressions), _known(reference)
    return Nearness(
        stream.names[stream.order[k]], color,
        len(made), _least(made), _median(made),
        len(real), _least(real), _median(real), int(_copies(made, real).sum()),
    )  # fmt: skip


def _known(values: Distances) -> npt.NDArray[np.float64]:
    return np.sort(values[np.isfinite(values)].astype(np.float64))


def _copies(made: npt.NDArray[np.float64], real: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Which synthetic images may be copies: closer than the closest real pair, or at no distance at all."""
    least = real[0] if len(real) else 0.0
    close: npt.NDArray[np.bool_] = (made < least) | (made == 0)
    return close


def _least(values: npt.NDArray[np.float64]) -> float | None:
    return float(values[0]) if len(values) else None


def _median(values: npt.NDArray[np.float64]) -> float | None:
    return float(np.median(values)) if len(values) else None


def _ratio(top: float | None, bottom: float | None) -> float | None:
    return None if top is None or not bottom else top / bottom


def _strip(row: Nearness, impressions: Distances, reference: Distances) -> Strip:
    made, real = _known(impressions), _known(reference)
    return Strip(row.name, tuple(made), tuple(_copies(made, real)), tuple(real))
