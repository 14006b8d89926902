"""Look at every file of a data set and say what is in it and what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from perdure.data.source import SPLITS, AbsentSplitError, Source, Split
from perdure.errors import DataError
from perdure.labels import BACKGROUND, IGNORE, TABLE_SIZE

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """One thing that keeps a sample or a split from being used; ``name`` is empty for a whole split."""

    split: Split
    name: str
    what: str
    hint: str


@dataclass(frozen=True)
class SplitReport:
    """What a split holds.

    Args:
        samples: Samples listed.
        readable: Samples without a problem; all figures below are over these.
        empty: Names of samples whose mask holds no class at all, only background or ignore.
        smallest: Spatial size of the smallest image (fewest pixels); ``()`` without images.
        largest: Spatial size of the largest image.
        images: Class id -> samples that hold it. All classes are there, 0 and 255 too.
        pixels: Class id -> pixels.
    """

    samples: int
    readable: int
    empty: tuple[str, ...]
    smallest: Shape
    largest: Shape
    images: dict[int, int]
    pixels: dict[int, int]


@dataclass(frozen=True)
class Inspection:
    """Result of :func:`inspect`.

    Args:
        dataset: Name of the source.
        classes: Id -> name, 0 and 255 included.
        splits: Report of each split that could be listed.
        absent: Split -> why the data set does not have it (no problem by itself).
        problems: The first problems, in the order of splits and samples.
        hidden: Problems beyond those.
    """

    dataset: str
    classes: dict[int, str]
    splits: dict[Split, SplitReport]
    absent: dict[Split, str]
    problems: tuple[Problem, ...]
    hidden: int

    @property
    def ok(self) -> bool:
        """True if something could be read and nothing is wrong with it."""
        return not self.problems and bool(self.splits)

    def unused(self, split: Split) -> tuple[str, ...]:
        """Names of the classes that no sample of a split holds."""
        counts = self.splits[split].images
        return tuple(name for k, name in self.classes.items() if k not in (BACKGROUND, IGNORE) and not counts[k])

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers for JSON."""
        return asdict(self) | {"ok": self.ok}


def inspect(
    source: Source,
    splits: Sequence[Split] = SPLITS,
    limit: int = 20,
    threads: int | None = None,
    advance: Callable[[], None] | None = None,
) -> Inspection:
    """Read every image and mask of the splits.

    Found are: lists that name missing files, unreadable or damaged files, images and masks of different size,
    labels outside the class list. Reading goes on after a problem.

    Args:
        source: The data set.
        splits: Which splits.
        limit: Problems that are told in full; further ones are counted.
        threads: Readers at once; all cores if not given.
        advance: Called after each sample, for a progress bar.
    """
    reports: dict[Split, SplitReport] = {}
    absent: dict[Split, str] = {}
    problems: list[Problem] = []
    for split in splits:
        try:
            names = source.names(split)
        except AbsentSplitError as error:
            absent[split] = error.what
        except DataError as error:
            problems.append(Problem(split, "", error.what, error.hint))
        else:
            looks = _looks(source, split, names, threads, advance)
            reports[split] = _report(source, split, names, looks, problems)
    classes = {BACKGROUND: source.space.name(BACKGROUND)} | {k: source.space.name(k) for k in source.space.ids}
    classes[IGNORE] = "ignore"
    return Inspection(source.name, classes, reports, absent, tuple(problems[:limit]), max(0, len(problems) - limit))


Look = tuple[Shape, npt.NDArray[np.int64]] | DataError
"""Spatial size and pixels a label ``(256,)`` of one sample, or what is wrong with it."""


def _look(source: Source, split: Split, name: str) -> Look:
    try:
        shape = source.image(split, name).shape[1:]
        mask = source.mask(split, name)
    except DataError as error:
        return error
    if mask.shape != shape:
        return DataError(
            f"{source.name}: image and mask of '{name}' differ in size: {_size(shape)} and {_size(mask.shape)}",
            "make the mask at the image's size (a photograph with a rotation flag must be saved upright first)",
        )
    return shape, np.bincount(mask.ravel(), minlength=TABLE_SIZE)


def _size(shape: Shape) -> str:
    return "×".join(map(str, shape))


def _looks(
    source: Source, split: Split, names: Sequence[str], threads: int | None, advance: Callable[[], None] | None
) -> Iterator[Look]:
    workers = threads or os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        waiting: list[Future[Look]] = []
        for name in names:
            waiting.append(pool.submit(_look, source, split, name))
            if len(waiting) > 4 * workers:  # results are taken as they come, so memory does not grow with the data
                yield waiting.pop(0).result()
                if advance is not None:
                    advance()
        for future in waiting:
            yield future.result()
            if advance is not None:
                advance()


def _report(
    source: Source, split: Split, names: Sequence[str], looks: Iterable[Look], problems: list[Problem]
) -> SplitReport:
    images, pixels = np.zeros(TABLE_SIZE, np.int64), np.zeros(TABLE_SIZE, np.int64)
    shapes: set[Shape] = set()
    empty: list[str] = []
    readable = 0
    for name, look in zip(names, looks, strict=True):
        if isinstance(look, DataError):
            problems.append(Problem(split, name, look.what, look.hint))
            continue
        shape, counts = look
        readable += 1
        shapes.add(shape)
        images += counts > 0
        pixels += counts
        if not counts[BACKGROUND + 1 : IGNORE].any():
            empty.append(name)
    ids = (BACKGROUND, *source.space.ids, IGNORE)
    by_area = sorted(shapes, key=lambda s: (int(np.prod(s)), s)) or [()]
    return SplitReport(
        samples=len(names),
        readable=readable,
        empty=tuple(empty),
        smallest=by_area[0],
        largest=by_area[-1],
        images={k: int(images[k]) for k in ids},
        pixels={k: int(pixels[k]) for k in ids},
    )
