"""Image lists: which classes each image shows (cached by content), and the rules that assign images to tasks.

Every rule is a pure function of the presence matrix: ``presence[i, c]`` is True if at least one pixel of mask i has
label c. ``groups`` holds the class ids per task in learning order. A rule returns one ascending array of row numbers
per task. Classes outside all groups (an order that leaves some out) neither select nor exclude images.

The last rule is a partition from a file. Published comparisons on ADE20K use one that was drawn once and published as a
matrix, which is not part of this package. Such a file has one of two forms:

* ``.npy``: numbers 0 and 1 of shape (images, tasks); row i is the i-th image in lexicographic name order;
* any other suffix: text with one image per line, ``NAME TASK``, tasks counted from 0; ``#`` starts a comment.

Images may be left out. No image may be in two tasks.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from perdure.data.source import Source, Split
from perdure.errors import DataError, PerdureError
from perdure.files import cache_dir, cache_secret, write_atomic
from perdure.labels import TABLE_SIZE

Presence = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]
Groups = Sequence[tuple[int, ...]]

_DIGEST = 32
_log = logging.getLogger(__name__)


def label_presence(source: Source, split: Split) -> Presence:
    """Read all labels of a split and return which labels each image shows (one pixel suffices).

    Returns:
        Bool ``(N, TABLE_SIZE)``: row n is sample n, column k is label k (background and ignore included).

    Raises:
        DataError: A mask cannot be read or holds an unknown label.
    """
    names = source.names(split)
    table = np.zeros((len(names), TABLE_SIZE), np.bool_)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # decoding releases the GIL, so threads help with masks; a class per image is in memory, where they cost time
        each = map if source.kind == "classification" else pool.map
        try:
            for row, labels in zip(table, each(lambda name: source.distinct_labels(split, name), names), strict=True):
                row[labels] = True
        except BaseException:
            pool.shutdown(cancel_futures=True)  # a mistake or an interrupt is told now, not after the last mask
            raise
    return table


def cached_presence(source: Source, split: Split) -> Presence:
    """Presence matrix ``(N, TABLE_SIZE)`` of a split in the order of ``source.names(split)``, cached on disk.

    The cache file is named after the split's fingerprint, with the key of this machine. It holds a checksum and packed
    bits, and no sample names. If it is damaged, the matrix is computed again. If the cache is not writable, a warning
    is logged.
    """
    count = len(source.names(split))
    text = f"presence 2 {source.fingerprint(split)}".encode()
    key = hashlib.blake2b(text, digest_size=20, key=cache_secret()).hexdigest()
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
                bits = np.packbits(known, axis=1).tobytes()
                content = hashlib.blake2b(bits, digest_size=_DIGEST).digest() + bits
                try:
                    write_atomic(path, lambda part: part.write_bytes(content))
                except PerdureError as error:  # a full disk: the lists themselves are known
                    _log.warning("image lists are not remembered: %s", error.what)
            return known
    except OSError as error:
        _log.warning("image lists are not remembered: %s: %s", path.parent, error.strerror or error)
    return label_presence(source, split)


def _read(path: Path, count: int) -> Presence | None:
    """The cached matrix, or None if it is missing or damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, bits = data[:_DIGEST], data[_DIGEST:]
    if len(bits) != count * TABLE_SIZE // 8 or hashlib.blake2b(bits, digest_size=_DIGEST).digest() != digest:
        return None
    # bits and not bytes: 512 bytes per image instead of 4 KB
    packed = np.frombuffer(bits, np.uint8).reshape(count, TABLE_SIZE // 8)
    return np.unpackbits(packed, axis=1).astype(bool)


def overlap(presence: Presence, groups: Groups) -> list[Rows]:
    """Images with at least one pixel of a task's classes. They may show later classes, and may recur."""
    return [np.flatnonzero(presence[:, list(group)].any(1)) for group in groups]


def disjoint(presence: Presence, groups: Groups) -> list[Rows]:
    """As :func:`overlap`, without images that show a class of a later task. No image is in two tasks."""
    rows: list[Rows] = []
    later = np.zeros(len(presence), np.bool_)
    for group in reversed(groups):
        shown = presence[:, list(group)].any(1)
        rows.append(np.flatnonzero(shown & ~later))
        later |= shown
    return rows[::-1]


def seen(presence: Presence, groups: Groups) -> list[Rows]:
    """Images with at least one pixel of a class seen so far: the test lists."""
    rows: list[Rows] = []
    earlier = np.zeros(len(presence), np.bool_)
    for group in groups:
        earlier |= presence[:, list(group)].any(1)
        rows.append(np.flatnonzero(earlier))
    return rows


def partition_by_rarest(presence: Presence, groups: Groups) -> list[Rows]:
    """Partition by our own, unpublished rule: each image belongs to the task of the rarest class that it shows.

    The rarest class is the one in the fewest images of this split; among equals, the one learned first. Images without
    any of the classes are left out. Rare classes keep all their images, so that late tasks have enough of them.
    """
    classes = [c for group in groups for c in group]
    shown = presence[:, classes]
    rank = np.empty(len(classes), np.int64)
    # the stable sort lets the class learned first win among equals
    rank[np.argsort(shown.sum(0), kind="stable")] = np.arange(len(classes))
    rarest = np.where(shown, rank, len(classes)).argmin(1)
    task_of = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    task = np.where(shown.any(1), task_of[rarest], -1)
    return [np.flatnonzero(task == i) for i in range(len(groups))]


def partition(presence: Presence, groups: Groups, assignment: Rows, names: Sequence[str]) -> list[Rows]:
    """Rows of each task according to an assignment.

    Raises:
        DataError: An image shows no class of its task: the file belongs to another split or class order.
    """
    lists = [np.flatnonzero(assignment == task) for task in range(len(groups))]
    for task, (rows, group) in enumerate(zip(lists, groups, strict=True)):
        wrong = rows[~presence[rows][:, list(group)].any(1)]
        if len(wrong):
            raise DataError(
                f"the partition gives image '{names[wrong[0]]}' ({len(wrong)} such images) to task {task}, "
                "but it shows none of its classes",
                "use the lists that belong to this split and this class order",
            )
    return lists


def read_partition(path: Path, names: Sequence[str], tasks: int) -> Rows:
    """Task of each image ``(N,)`` in the order of ``names``; -1 for images that the file leaves out.

    Raises:
        DataError: The file is missing or damaged, or does not match the images or the number of tasks.
    """
    if not path.is_file():
        raise DataError(
            f"the partition file {path} does not exist",
            "give the path of the published lists, or choose setting partition-rarest",
        )
    return _from_matrix(path, names, tasks) if path.suffix == ".npy" else _from_text(path, names, tasks)


def _from_matrix(path: Path, names: Sequence[str], tasks: int) -> Rows:
    try:
        with path.open("rb") as stream:  # np.load would also take archives
            matrix = np.lib.format.read_array(stream, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is not a readable .npy matrix: {error}", "write it with numpy.save") from error
    if matrix.shape != (len(names), tasks):
        raise DataError(
            f"{path} has shape {matrix.shape}, expected {(len(names), tasks)}",
            "one row per image, one column per task",
        )
    if not np.isin(matrix, (0, 1)).all():
        raise DataError(f"{path} holds other numbers than 0 and 1", "write 1 in the column of the image's task, else 0")
    double = np.flatnonzero(matrix.sum(1) > 1)
    # rows follow sorted names, whatever the order of the data set's own list
    ordered = sorted(range(len(names)), key=names.__getitem__)
    if len(double):
        raise DataError(f"{path} gives image '{names[ordered[double[0]]]}' to two tasks")
    result = np.full(len(names), -1, np.int64)
    result[ordered] = np.where(matrix.any(1), matrix.argmax(1), -1)
    return result


def _from_text(path: Path, names: Sequence[str], tasks: int) -> Rows:
    row_of = {name: row for row, name in enumerate(names)}
    result = np.full(len(names), -1, np.int64)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a readable text file: {error}") from error
    for number, line in enumerate(lines, 1):
        words = line.split("#", 1)[0].rsplit(None, 1)
        if not words:
            continue
        where = f"{path}, line {number}"
        if len(words) != 2 or not words[1].isdecimal():
            raise DataError(f"{where}: expected 'NAME TASK'", "tasks are counted from 0")
        name, task = words[0].strip(), int(words[1])
        if name not in row_of:
            raise DataError(f"{where}: no training image '{name}'", f"names look like '{names[0]}'")
        if task >= tasks:
            raise DataError(f"{where}: there is no task {task}", f"tasks are numbered from 0 to {tasks - 1}")
        if result[row_of[name]] >= 0:
            raise DataError(f"{where}: image '{name}' occurs twice")
        result[row_of[name]] = task
    if (result < 0).all():
        raise DataError(f"{path} names no image", "write one image per line: NAME TASK")
    return result
