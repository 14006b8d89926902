"""Reads every sample once before work starts, and remembers which ones are sound."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from perdure.data.readers.imagefiles import file_size_and_time
from perdure.data.source import SPLITS, AbsentSplitError, Source, Split, UnknownLabelError, read_arrays
from perdure.errors import DataError, PerdureError
from perdure.files import cache_dir, cache_secret, write_atomic
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


@dataclass(frozen=True)
class Survey:
    """Result of :func:`survey`: problems of samples, and images in two splits see :func:`shared_pictures`."""

    problems: list[Problem]
    shared: dict[str, dict[str, str]]

    def joined(self, other: Survey) -> Survey:
        """What was found in two data sets."""
        pairs = {pair: self.shared.get(pair, {}) | other.shared.get(pair, {}) for pair in (self.shared | other.shared)}
        return Survey(self.problems + other.problems, pairs)


def survey(source: Source, begin: Callable[[int], Callable[[], None]]) -> Survey:
    """Find whatever cannot be read in any split, before work starts: a damaged test image would end a run after hours.

    Every image and mask is decoded once, which is the only way to find a truncated one. That it is sound is remembered
    by path, size and time of change of its files (in the cache folder: digests with the key of this machine, see
    :func:`perdure.files.cache_secret`), so that further runs on the same files read none of them again. Measured on two
    cores: see docs/adding-your-data.md.

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
    stamps = {split: stamps_of(source, split, names) for split, names in listed.items()}
    pictures = {split: _remembered(*stamps[split], names) for split, names in listed.items()}
    anew = {split: [name for name in names if name not in pictures[split]] for split, names in listed.items()}
    total = sum(map(len, anew.values()))
    advance = begin(total) if total else None
    problems: list[Problem] = []
    for split, names in anew.items():
        for name, future in zip(names, read_in_order(source, split, names, None, advance), strict=True):
            try:
                pictures[split][name] = future.result().picture
            except DataError as error:
                problems.append(Problem.of(split, name, error))
        if names:
            remember(*stamps[split], listed[split], pictures[split])
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


class Content(NamedTuple):
    """Spatial size of a sample, its pixels per label ``(TABLE_SIZE,)``, and a digest of the image."""

    shape: Shape
    counts: npt.NDArray[np.int64]
    picture: bytes


def _read(source: Source, split: Split, name: str) -> Content:
    """Content of one sample. Raises DataError where it cannot be used."""
    image, mask = read_arrays(source, split, name)
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
    digest = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=_DIGEST, key=cache_secret())
    digest.update(repr(image.shape).encode())
    return Content(shape, counts, digest.digest())


def read_in_order(
    source: Source, split: Split, names: Sequence[str], workers: int | None, advance: Callable[[], None] | None
) -> Iterator[Future[Content]]:
    """What threads read, finished and in the order of the names."""
    workers = workers or os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Content]] = deque()
        for k in range(len(names) + 4 * workers):
            if k < len(names):
                waiting.append(pool.submit(_read, source, split, names[k]))
            # results are taken while reading goes on, so that memory does not grow with the data
            if k >= 4 * workers and waiting:
                wait([waiting[0]])
                yield waiting.popleft()
                if advance is not None:
                    advance()


def stamps_of(source: Source, split: Split, names: Sequence[str]) -> tuple[Path | None, list[bytes]]:
    """Where sound samples of a split are remembered, and by what each of them; None without files to go by.

    To be taken before the files are read: one that changes meanwhile is then read anew the next time.
    """
    stamps: list[bytes] = []
    known: dict[Path, tuple[str, int, int]] = {}
    place, secret = "", cache_secret()
    for name in names:
        files = source.files(split, name)
        for file in files:
            known.setdefault(file, file_size_and_time(file))
        if not files:
            return None, []
        place = place or str(Path(known[files[0]][0]).parent)
        text = repr((name, [known[file] for file in files])).encode(errors="surrogateescape")
        stamps.append(hashlib.blake2b(text, digest_size=_DIGEST, key=secret).digest())
    key = hashlib.blake2b(f"sound 3 {split} {place}".encode(errors="surrogateescape"), digest_size=20, key=secret)
    key.update(source.reading())
    return cache_dir() / "sound" / key.hexdigest(), stamps


def _remembered(path: Path | None, stamps: Sequence[bytes], names: Sequence[str]) -> Pictures:
    """Digest of the image of each sample that was sound when its files were read last and has not changed since."""
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


def remember(path: Path | None, stamps: Sequence[bytes], names: Sequence[str], pictures: Pictures) -> None:
    """Write down which samples are sound."""
    if path is None:
        return
    pairs = zip(names, stamps, strict=True)
    rows = b"".join(stamp + pictures[name] for name, stamp in pairs if name in pictures)
    content = hashlib.blake2b(rows, digest_size=_DIGEST).digest() + rows
    try:
        write_atomic(path, lambda part: part.write_bytes(content))
    except PerdureError as error:  # a full disk or a cache that cannot be written: nothing is lost but time
        _log.warning("checked files are not remembered: %s", error.what)
