"""Checks every file of a data set: its content and its problems."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from perdure.data.source import SPLITS, AbsentSplitError, Kind, Source, Split
from perdure.data.survey import (
    Content,
    Pictures,
    Problem,
    Shape,
    read_in_order,
    remember,
    shared_pictures,
    stamps_of,
)
from perdure.errors import DataError
from perdure.labels import BACKGROUND, IGNORE, TABLE_SIZE


def alike_as_one(problems: Sequence[Problem]) -> list[Problem]:
    """Masks of a split with the same unknown number as one problem: a class that is not listed is in most of them."""
    masks: dict[tuple[str, int], list[Problem]] = {}
    for problem in problems:
        for label in problem.labels:
            masks.setdefault((problem.split, label), []).append(problem)
    told: list[Problem] = []
    done: set[tuple[str, int]] = set()
    for problem in problems:
        # a number that only this mask holds is told with the others of the mask
        keys = [key for label in problem.labels if len(masks[key := (problem.split, label)]) > 1]
        if not keys:
            told.append(problem)
        for key in keys:
            if key not in done:
                label = key[1]
                what = f"label {label} in {len(masks[key])} masks (first: {problem.what})"
                hint = problem.hint.replace(f"{{{problem.labels[0]}:", f"{{{label}:")
                also = tuple(other.name for other in masks[key][1:])
                told.append(
                    replace(problem, name="", what=what, hint=hint, labels=(label,), also=(problem.name, *also))
                )
                done.add(key)
    return told


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
        repeated: Samples with the same pixels as an earlier sample of the split.
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
        shared: ``"train, test"`` -> samples of the second split with the same pixels as one of the first, each with
            the name that it has there; without empty ones. Not a problem, but it makes figures too good.
    """

    dataset: str
    classes: dict[int, str]
    splits: dict[Split, SplitReport]
    absent: dict[Split, str]
    problems: tuple[Problem, ...]
    hidden: int
    kind: Kind = "segmentation"
    shared: dict[str, dict[str, str]] = field(default_factory=dict)

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
    the class list, training masks without any class, and images that occur twice. Reading continues after a problem.

    Args:
        source: The data set.
        splits: Splits to read.
        limit: Number of problems to report in full; further ones are counted.
        threads: Number of reading threads; by default one per core.
        advance: Called after each sample, for a progress bar.
    """
    reports: dict[Split, SplitReport] = {}
    pictures: dict[Split, Pictures] = {}
    absent: dict[Split, str] = {}
    problems: list[Problem] = []
    for split in splits:
        try:
            names, gaps = source.listing(split)
        except AbsentSplitError as error:
            absent[split] = error.what
        except DataError as error:
            problems.append(Problem.of(split, "", error))
        else:
            # with holdout, train and test come from the same two folders: what is wrong there is told once
            known = {problem.what for problem in problems}
            problems += [Problem.of(split, "", gap) for gap in gaps if gap.what not in known]
            stamps = stamps_of(source, split, names)  # before anything is read, see there
            found = read_in_order(source, split, names, threads, advance)
            reports[split], pictures[split] = _report(source, split, names, found, problems)
            remember(*stamps, names, pictures[split])
    classes = {k: source.space.name(k) for k in source.space.ids}
    if source.kind == "segmentation":
        classes = {BACKGROUND: source.space.name(BACKGROUND)} | classes | {IGNORE: "ignore"}
    problems = alike_as_one(problems)
    told, hidden = tuple(problems[:limit]), max(0, len(problems) - limit)
    return Inspection(source.name, classes, reports, absent, told, hidden, source.kind, shared_pictures(pictures))


def _report(
    source: Source, split: Split, names: Sequence[str], found: Iterator[Future[Content]], problems: list[Problem]
) -> tuple[SplitReport, Pictures]:
    """Report of a split, and the digests of its images."""
    images, pixels = np.zeros(TABLE_SIZE, np.int64), np.zeros(TABLE_SIZE, np.int64)
    shapes: set[Shape] = set()
    empty: list[str] = []
    pictures: Pictures = {}
    for name, future in zip(names, found, strict=True):
        try:
            content = future.result()
        except DataError as error:
            problems.append(Problem.of(split, name, error))
            continue
        shapes.add(content.shape)
        images += content.counts > 0
        pixels += content.counts
        pictures[name] = content.picture
        if not content.counts[BACKGROUND + 1 : IGNORE].any():
            empty.append(name)
    whole = source.kind == "classification"
    if split == "train" and not whole and pictures and not pixels[list(source.space.ids)].any():
        ignored = " and 255 (ignore)" if pixels[IGNORE] else ""
        hint = "if 255 is a class, read it as one: values={255: 1} (data.values in a recipe)" if ignored else ""
        problems.append(Problem(split, "", f"no training mask shows a class, only background{ignored}", hint))
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
        repeated=len(pictures) - len(set(pictures.values())),
    )
    return report, pictures
