"""Checks every file of a data set: its content and its problems."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from perdure.data.source import SPLITS, AbsentSplitError, Kind, Source, Split
from perdure.errors import DataError
from perdure.labels import BACKGROUND, IGNORE, TABLE_SIZE

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """One reason why a sample or a split cannot be used; ``name`` is empty for a whole split."""

    split: Split
    name: str
    what: str
    hint: str


@dataclass(frozen=True)
class SplitReport:
    """Content of a split.

    Args:
        samples: Samples listed.
        readable: Samples without a problem. All values below are computed from these.
        empty: Names of samples whose mask holds only background or ignore; none in classification.
        smallest: Spatial size of the smallest image (fewest pixels); ``()`` without images.
        largest: Spatial size of the largest image.
        images: Class id -> samples that show it, for all classes; in segmentation also for background and ignore.
        pixels: Class id -> pixels; empty in classification.
        repeated: Samples with the same pixels as an earlier sample of the split; counted only in classification.
    """

    samples: int
    readable: int
    empty: tuple[str, ...]
    smallest: Shape
    largest: Shape
    images: dict[int, int]
    pixels: dict[int, int]
    repeated: int = 0


@dataclass(frozen=True)
class Inspection:
    """Result of :func:`inspect`.

    Args:
        dataset: Name of the source.
        classes: Id -> name; in segmentation background and ignore included.
        splits: Report of each split that could be listed.
        absent: Split -> reason why the data set does not have it. Not a problem.
        problems: The first problems, in the order of splits and samples.
        hidden: Number of further problems.
        kind: What a label describes: every pixel, or the image.
        shared: ``"train, test"`` -> samples of the second split with the same pixels as one of the first, without
            zeros; counted only in classification. Not a problem, but it makes figures too good.
    """

    dataset: str
    classes: dict[int, str]
    splits: dict[Split, SplitReport]
    absent: dict[Split, str]
    problems: tuple[Problem, ...]
    hidden: int
    kind: Kind = "segmentation"
    shared: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """True if at least one split could be read and there is no problem."""
        return not self.problems and bool(self.splits)

    def unused(self, split: Split) -> tuple[str, ...]:
        """Names of the classes that no sample of a split shows."""
        counts = self.splits[split].images
        return tuple(name for k, name in self.classes.items() if k not in (BACKGROUND, IGNORE) and not counts[k])

    def to_dict(self) -> dict[str, object]:
        """Plain dictionaries, lists and numbers for JSON."""
        return asdict(self) | {"ok": self.ok}


def inspect(
    source: Source,
    splits: Sequence[Split] = SPLITS,
    limit: int = 20,
    threads: int | None = None,
    advance: Callable[[], None] | None = None,
) -> Inspection:
    """Read every image and label of the splits.

    Finds lists that name missing files, unreadable or damaged files, images and masks of different size, labels outside
    the class list and, in classification, repeated images. Reading continues after a problem.

    Args:
        source: The data set.
        splits: Splits to read.
        limit: Number of problems to report in full; further ones are counted.
        threads: Number of reading threads; by default one per core.
        advance: Called after each sample, for a progress bar.
    """
    reports: dict[Split, SplitReport] = {}
    pictures: dict[Split, list[bytes]] = {}
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
            found = _in_order(source, split, names, threads or os.cpu_count() or 1, advance)
            reports[split], pictures[split] = _report(source, split, names, found, problems)
    classes = {k: source.space.name(k) for k in source.space.ids}
    if source.kind == "segmentation":
        classes = {BACKGROUND: source.space.name(BACKGROUND)} | classes | {IGNORE: "ignore"}
    pairs = {f"{a}, {b}": sum(map(set(pictures[a]).__contains__, pictures[b])) for a, b in combinations(pictures, 2)}
    shared = {pair: count for pair, count in pairs.items() if count}
    told, hidden = tuple(problems[:limit]), max(0, len(problems) - limit)
    return Inspection(source.name, classes, reports, absent, told, hidden, source.kind, shared)


class _Content(NamedTuple):
    """Spatial size of a sample, its pixels per label ``(TABLE_SIZE,)``; in classification a digest of the image."""

    shape: Shape
    counts: npt.NDArray[np.int64]
    picture: bytes


def _read(source: Source, split: Split, name: str) -> _Content:
    """Content of one sample. Raises DataError where it cannot be used."""
    image, mask = source.image(split, name), source.mask(split, name)
    shape, picture = image.shape[1:], b""
    if source.kind == "classification":
        if mask.shape != () or int(mask) not in source.space.ids:
            raise DataError(
                f"{source.name}: '{name}' has label {mask}, which is no class",
                "correct the label: class ids are those of the class list",
            )
        # pixels and not files are compared: repeats in published sets are often stored anew
        digest = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16)
        digest.update(repr(image.shape).encode())
        picture = digest.digest()
    elif mask.shape != shape:
        sizes = " and ".join("×".join(map(str, size)) for size in (shape, mask.shape))
        raise DataError(
            f"{source.name}: image and mask of '{name}' differ in size: {sizes}",
            "make the mask at the image's size (a photograph with a rotation flag must be saved upright first)",
        )
    return _Content(shape, np.bincount(mask.ravel(), minlength=TABLE_SIZE), picture)


def _in_order(
    source: Source, split: Split, names: Sequence[str], workers: int, advance: Callable[[], None] | None
) -> Iterator[Future[_Content]]:
    """What threads read, finished and in the order of the names."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[_Content]] = deque()
        for k in range(len(names) + 4 * workers):
            if k < len(names):
                waiting.append(pool.submit(_read, source, split, names[k]))
            # results are taken while reading goes on, so that memory does not grow with the data
            if k >= 4 * workers and waiting:
                wait([waiting[0]])
                yield waiting.popleft()
                if advance is not None:
                    advance()


def _report(
    source: Source, split: Split, names: Sequence[str], found: Iterable[Future[_Content]], problems: list[Problem]
) -> tuple[SplitReport, list[bytes]]:
    """Report of a split, and the digests of its images (in classification)."""
    images, pixels = np.zeros(TABLE_SIZE, np.int64), np.zeros(TABLE_SIZE, np.int64)
    shapes: set[Shape] = set()
    empty: list[str] = []
    pictures: list[bytes] = []
    for name, future in zip(names, found, strict=True):
        try:
            content = future.result()
        except DataError as error:
            problems.append(Problem(split, name, error.what, error.hint))
            continue
        shapes.add(content.shape)
        images += content.counts > 0
        pixels += content.counts
        pictures.append(content.picture)
        if not content.counts[BACKGROUND + 1 : IGNORE].any():
            empty.append(name)
    whole = source.kind == "classification"
    ids = source.space.ids if whole else (BACKGROUND, *source.space.ids, IGNORE)
    by_area = sorted(shapes, key=lambda s: (int(np.prod(s)), s)) or [()]
    report = SplitReport(
        samples=len(names),
        readable=len(pictures),
        empty=tuple(empty),
        smallest=by_area[0],
        largest=by_area[-1],
        images={k: int(images[k]) for k in ids},
        pixels={} if whole else {k: int(pixels[k]) for k in ids},
        repeated=len(pictures) - len(set(pictures)) if whole else 0,
    )
    return report, pictures if whole else []
