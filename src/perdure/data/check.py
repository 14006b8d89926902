"""Checks every file of a data set: its content and its problems."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from perdure.data.readers.imagefiles import file_size_and_time
from perdure.data.source import SPLITS, AbsentSplitError, Kind, Source, Split, UnknownLabelError
from perdure.errors import DataError, PerdureError
from perdure.files import cache_dir, write_atomic
from perdure.labels import BACKGROUND, IGNORE, TABLE_SIZE

Shape = tuple[int, ...]
Pictures = dict[str, bytes]
"""Name of a sample -> digest of its decoded pixels."""
_DIGEST: Final = 16
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """One reason why a sample or a split cannot be used; ``name`` is empty for a whole split, ``split`` for a recipe.

    ``labels`` are numbers in a mask that mean nothing, ``also`` further samples with the very same problem.
    """

    split: Split | Literal[""]
    name: str
    what: str
    hint: str
    labels: tuple[int, ...] = ()
    also: tuple[str, ...] = ()

    @classmethod
    def of(cls, split: Split, name: str, error: DataError) -> Problem:
        """A problem from the error that told it."""
        labels = error.labels if isinstance(error, UnknownLabelError) else ()
        return cls(split, name, error.what, error.hint, labels)


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
            found = _in_order(source, split, names, threads, advance)
            reports[split], pictures[split] = _report(source, split, names, found, problems)
            _remember(source, split, names, pictures[split])
    classes = {k: source.space.name(k) for k in source.space.ids}
    if source.kind == "segmentation":
        classes = {BACKGROUND: source.space.name(BACKGROUND)} | classes | {IGNORE: "ignore"}
    problems = alike_as_one(problems)
    told, hidden = tuple(problems[:limit]), max(0, len(problems) - limit)
    return Inspection(source.name, classes, reports, absent, told, hidden, source.kind, shared_pictures(pictures))


@dataclass(frozen=True)
class Survey:
    """Result of :func:`survey`: problems of samples, and images in two splits as :attr:`Inspection.shared` has them."""

    problems: list[Problem]
    shared: dict[str, dict[str, str]]


def survey(source: Source, begin: Callable[[int], Callable[[], None]]) -> Survey:
    """Find whatever cannot be read in any split, before work starts: a damaged test image would end a run after hours.

    Every image and mask is decoded once, which is the only way to find a truncated one. That it is sound is remembered
    by path, size and time of change of its files (in the cache folder; digests only, nothing of an image), so that
    further runs on the same files read none of them again. Measured on two cores: see docs/adding-your-data.md.

    Args:
        source: The data set.
        begin: Called with the number of samples that have to be read, unless that is 0; what it returns is called
            after each of them.

    Raises:
        DataError: A split that is there cannot be listed.
    """
    listed: dict[Split, Sequence[str]] = {}
    for split in SPLITS:
        try:
            listed[split] = source.names(split)
        except AbsentSplitError:
            continue
    pictures = {split: _remembered(source, split, names) for split, names in listed.items()}
    anew = {split: [name for name in names if name not in pictures[split]] for split, names in listed.items()}
    total = sum(map(len, anew.values()))
    advance = begin(total) if total else None
    problems: list[Problem] = []
    for split, names in anew.items():
        for name, future in zip(names, _in_order(source, split, names, None, advance), strict=True):
            try:
                pictures[split][name] = future.result().picture
            except DataError as error:
                problems.append(Problem.of(split, name, error))
        if names:
            _remember(source, split, listed[split], pictures[split])
    return Survey(problems, shared_pictures(pictures))


def shared_pictures(pictures: Mapping[Split, Pictures]) -> dict[str, dict[str, str]]:
    """Images in two splits: ``"train, test"`` -> name in the second -> name in the first; empty pairs are left out.

    Decoded pixels are compared, not files: repeats in published sets are often stored anew. An image that was scaled,
    or compressed again with loss, is another image.
    """
    found: dict[str, dict[str, str]] = {}
    for a, b in combinations(pictures, 2):
        known = {picture: name for name, picture in reversed(pictures[a].items())}
        found[f"{a}, {b}"] = {name: known[picture] for name, picture in pictures[b].items() if picture in known}
    return {pair: names for pair, names in found.items() if names}


def told(shared: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What to say of images in two splits."""
    lines = []
    for pair, names in shared.items():
        first, second = pair.split(", ")
        some = ", ".join(f"{name} = {first} {names[name]}" for name in list(names)[:3]) + (
            ", …" if len(names) > 3 else ""
        )
        what = f"{len(names)} images of {second} are" if len(names) > 1 else f"1 image of {second} is"
        lines.append(f"{what} also in {first}, pixel for pixel ({some}): figures become too good")
    return lines


class _Content(NamedTuple):
    """Spatial size of a sample, its pixels per label ``(TABLE_SIZE,)``, and a digest of the image."""

    shape: Shape
    counts: npt.NDArray[np.int64]
    picture: bytes


def _read(source: Source, split: Split, name: str) -> _Content:
    """Content of one sample. Raises DataError where it cannot be used."""
    try:
        image, mask = source.image(split, name), source.mask(split, name)
    except (PerdureError, MemoryError):
        raise
    except Exception as error:  # whatever a reader of one's own does
        raise DataError(
            f"{source.name}: '{name}' cannot be read: {type(error).__name__}: {error}", "correct the reader or the file"
        ) from error
    if not isinstance(image, np.ndarray) or image.ndim < 3 or image.dtype not in (np.uint8, np.float32):
        told = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise DataError(
            f"{source.name}: the image of '{name}' is {told}", "a reader returns an array (C, H, W), uint8 or float32"
        )
    shape = image.shape[1:]
    if source.kind == "classification":
        if mask.shape != () or int(mask) not in source.space.ids:
            raise DataError(
                f"{source.name}: '{name}' has label {mask}, which is no class",
                "correct the label: class ids are those of the class list",
            )
    elif mask.shape != shape:
        raise source.size_error(split, name, shape, mask.shape)
    counts = np.bincount(mask.ravel(), minlength=TABLE_SIZE)
    known = source.space.ids if source.kind == "classification" else (BACKGROUND, *source.space.ids, IGNORE)
    if len(counts) > TABLE_SIZE or counts.sum() != counts[list(known)].sum():
        raise DataError(
            f"{source.name}: the mask of '{name}' holds label {int(np.setdiff1d(mask, known)[0])}, which is no class",
            "a reader returns the ids of its classes, 0 for background and IGNORE",
        )
    digest = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=_DIGEST)
    digest.update(repr(image.shape).encode())
    return _Content(shape, counts, digest.digest())


def _in_order(
    source: Source, split: Split, names: Sequence[str], workers: int | None, advance: Callable[[], None] | None
) -> Iterator[Future[_Content]]:
    """What threads read, finished and in the order of the names."""
    workers = workers or os.cpu_count() or 1
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
    source: Source, split: Split, names: Sequence[str], found: Iterator[Future[_Content]], problems: list[Problem]
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


def _stamps(source: Source, split: Split, names: Sequence[str]) -> tuple[Path | None, list[bytes]]:
    """Where sound samples of a split are remembered, and by what each of them; None without files to go by."""
    stamps: list[bytes] = []
    known: dict[Path, tuple[str, int, int]] = {}
    place = ""
    for name in names:
        files = source.files(split, name)
        for file in files:
            known.setdefault(file, file_size_and_time(file))
        if not files:
            return None, []
        place = place or str(Path(known[files[0]][0]).parent)
        text = repr((name, [known[file] for file in files])).encode(errors="surrogateescape")
        stamps.append(hashlib.blake2b(text, digest_size=_DIGEST).digest())
    key = hashlib.blake2b(f"sound 1 {split} {place}".encode(errors="surrogateescape"), digest_size=20)
    key.update(source.reading())
    return cache_dir() / "sound" / key.hexdigest(), stamps


def _remembered(source: Source, split: Split, names: Sequence[str]) -> Pictures:
    """Digest of the image of each sample that was sound when its files were read last and has not changed since."""
    path, stamps = _stamps(source, split, names)
    try:
        content = b"" if path is None else path.read_bytes()
    except OSError:
        return {}
    check, rows = content[:_DIGEST], content[_DIGEST:]
    if hashlib.blake2b(rows, digest_size=_DIGEST).digest() != check:
        return {}
    size = 2 * _DIGEST
    known = {rows[k : k + _DIGEST]: rows[k + _DIGEST : k + size] for k in range(0, len(rows), size)}
    return {name: known[stamp] for name, stamp in zip(names, stamps, strict=True) if stamp in known}


def _remember(source: Source, split: Split, names: Sequence[str], pictures: Pictures) -> None:
    """Write down which samples are sound."""
    path, stamps = _stamps(source, split, names)
    if path is None:
        return
    pairs = zip(names, stamps, strict=True)
    rows = b"".join(stamp + pictures[name] for name, stamp in pairs if name in pictures)
    content = hashlib.blake2b(rows, digest_size=_DIGEST).digest() + rows
    try:
        write_atomic(path, lambda part: part.write_bytes(content))
    except PerdureError as error:  # a full disk or a cache that cannot be written: nothing is lost but time
        _log.warning("checked files are not remembered: %s", error.what)
