"""Image lists: which classes each image shows (cached by content), and the rules that assign images to tasks.

Every rule is a pure function of the presence matrix: ``presence[i, c]`` is True if at least one pixel of mask i has
label c. ``groups`` holds the class ids per task in learning order. A rule returns one ascending array of row numbers
per task. Classes outside all groups (an order that leaves some out) neither select nor exclude images.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from perdure.data.presence import label_presence
from perdure.data.source import Source, Split
from perdure.errors import PerdureError
from perdure.files import write_atomic
from perdure.labels import TABLE_SIZE

Presence = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]
Groups = Sequence[tuple[int, ...]]

_DIGEST = 32
_log = logging.getLogger(__name__)


def cache_dir() -> Path:
    """Cache folder: ``$PERDURE_CACHE``, else the user's cache folder. Its content can be computed again."""
    named = os.environ.get("PERDURE_CACHE")
    if named:
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "perdure" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "perdure"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "perdure"


def cached_presence(source: Source, split: Split) -> Presence:
    """Presence matrix ``(N, TABLE_SIZE)`` of a split in the order of ``source.names(split)``, cached on disk.

    The cache file is named after the split's fingerprint. It holds a checksum and packed bits, and no sample names. If
    it is damaged, the matrix is computed again. If the cache is not writable, a warning is logged.
    """
    count = len(source.names(split))
    key = hashlib.blake2b(f"presence 2 {source.fingerprint(split)}".encode(), digest_size=20).hexdigest()
    path = cache_dir() / "presence" / f"{key}.bits"
    known = _read(path, count)
    if known is not None:
        return known
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):  # one process computes, the others wait
            known = _read(path, count)
            if known is None:
                known = label_presence(source, split)
                _write(path, known)
            return known
    except OSError as error:
        _log.warning("image lists are not remembered: %s: %s", path.parent, error.strerror or error)
    return label_presence(source, split)


def _write(path: Path, presence: Presence) -> None:
    bits = np.packbits(presence, axis=1).tobytes()
    digest = hashlib.blake2b(bits, digest_size=_DIGEST).digest()

    def fill(part: Path) -> None:
        part.write_bytes(digest + bits)

    try:
        write_atomic(path, fill)
    except PerdureError as error:
        _log.warning("image lists are not remembered: %s", error.what)


def _read(path: Path, count: int) -> Presence | None:
    """The cached matrix, or None if it is missing or damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, bits = data[:_DIGEST], data[_DIGEST:]
    if len(bits) != count * TABLE_SIZE // 8 or hashlib.blake2b(bits, digest_size=_DIGEST).digest() != digest:
        return None
    packed = np.frombuffer(bits, np.uint8).reshape(count, TABLE_SIZE // 8)
    return np.unpackbits(packed, axis=1).astype(bool)


def overlap(presence: Presence, groups: Groups) -> list[Rows]:
    """Images with at least one pixel of a task's classes. They may show later classes, and may recur."""
    return [np.flatnonzero(_shows(presence, group)) for group in groups]


def disjoint(presence: Presence, groups: Groups) -> list[Rows]:
    """As :func:`overlap`, without images that show a class of a later task. No image is in two tasks."""
    later = [_flatten(groups[i + 1 :]) for i in range(len(groups))]
    return [
        np.flatnonzero(_shows(presence, group) & ~_shows(presence, future))
        for group, future in zip(groups, later, strict=True)
    ]


def seen(presence: Presence, groups: Groups) -> list[Rows]:
    """Images with at least one pixel of a class seen so far: the test lists."""
    return [np.flatnonzero(_shows(presence, _flatten(groups[: i + 1]))) for i in range(len(groups))]


def partition_by_rarest(presence: Presence, groups: Groups) -> list[Rows]:
    """Partition by our own, unpublished rule: each image belongs to the task of the rarest class that it shows.

    The rarest class is the one in the fewest images of this split; among equals, the one learned first. Images without
    any of the classes are left out. Rare classes keep all their images, so that late tasks have enough of them.
    """
    classes = _flatten(groups)
    shown = presence[:, classes]
    rank = np.empty(len(classes), np.int64)
    rank[np.argsort(shown.sum(0), kind="stable")] = np.arange(len(classes))
    rarest = np.where(shown, rank, len(classes)).argmin(1)
    task_of = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    task = np.where(shown.any(1), task_of[rarest], -1)
    return [np.flatnonzero(task == i) for i in range(len(groups))]


def _shows(presence: Presence, classes: Sequence[int]) -> Presence:
    return np.asarray(presence[:, list(classes)].any(1))


def _flatten(groups: Groups) -> list[int]:
    return [c for group in groups for c in group]
