"""Image partitions from a file: which image belongs to which task.

Published comparisons on ADE20K use a partition that was drawn once and published as a matrix. The matrix is not part of
this package. A partition file has one of two forms:

* ``.npy``: numbers 0 and 1 of shape (images, tasks); row i is the i-th image in lexicographic name order;
* any other suffix: text with one image per line, ``NAME TASK``, tasks counted from 0; ``#`` starts a comment.

Images may be left out. No image may be in two tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from perdure.errors import DataError
from perdure.streams.lists import Groups, Presence, Rows


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
    return _matrix(path, names, tasks) if path.suffix == ".npy" else _text(path, names, tasks)


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


def _matrix(path: Path, names: Sequence[str], tasks: int) -> Rows:
    try:
        matrix = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is not a readable .npy matrix: {error}", "write it with numpy.save") from error
    if not isinstance(matrix, np.ndarray) or matrix.shape != (len(names), tasks):
        shape = getattr(matrix, "shape", "an archive")
        raise DataError(
            f"{path} has shape {shape}, expected {(len(names), tasks)}",
            "one row per image, one column per task",
        )
    if not np.isin(matrix, (0, 1)).all():
        raise DataError(f"{path} holds other numbers than 0 and 1", "write 1 in the column of the image's task, else 0")
    double = np.flatnonzero(matrix.sum(1) > 1)
    ordered = sorted(range(len(names)), key=names.__getitem__)
    if len(double):
        raise DataError(f"{path} gives image '{names[ordered[double[0]]]}' to two tasks")
    result = np.full(len(names), -1, np.int64)
    result[ordered] = np.where(matrix.any(1), matrix.argmax(1), -1)
    return result


def _text(path: Path, names: Sequence[str], tasks: int) -> Rows:
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
