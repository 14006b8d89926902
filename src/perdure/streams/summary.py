"""Summary of a stream, for checks before a run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple, TypedDict

import numpy as np

from perdure.data.dataset import Samples, members
from perdure.data.source import AbsentSplitError, Source
from perdure.errors import UsageError
from perdure.labels import BACKGROUND, LabelSpace
from perdure.streams.lists import Presence, cached_presence
from perdure.streams.task import Stream, Task


class TaskSummary(TypedDict):
    """Content of one task; ``images`` and ``shown_by_images`` are by split and by name of the data set."""

    index: int
    name: str
    new: list[str]
    annotated: list[str]
    recurs: bool
    images: dict[str, dict[str, int] | None]
    shown_by_images: dict[str, dict[str, dict[str, int]] | None]
    without_images: list[str]


class StreamSummary(TypedDict):
    """Content of a stream, ready for JSON; ``validation`` says why there is no validation set, else it is empty."""

    protocol: str
    validation: str
    classes: int
    left_out: list[str]
    tasks: list[TaskSummary]


class _Known(NamedTuple):
    """Presence matrix of a split. Holds the source, so that no other object gets its ``id()``, the cache key."""

    source: Source
    presence: Presence
    row_of: dict[str, int]


def list_sizes(stream: Stream) -> dict[str, list[int] | None]:
    """Images per task of ``train``, ``validation`` and ``test`` (all test sets together).

    ``validation`` is None if the data set has no validation split. No image is read.
    """
    sizes: dict[str, list[int] | None] = {"train": [], "validation": [], "test": []}
    for task in stream.tasks:
        for split, views in _views(task).items():
            so_far = sizes[split]
            if views is None or so_far is None:
                sizes[split] = None
            else:
                so_far.append(sum(len(view) for view in views.values()))
    return sizes


def left_out_rows(stream: Stream) -> list[int]:
    """Zero-based positions, in lexicographic name order, of training images outside every task of the stream.

    For class-incremental streams; published partitions state these positions.
    """
    views = [_views(task)["train"] or {} for task in stream.tasks]
    datasets = [dataset for view in views for samples in view.values() for dataset in members(samples)]
    used = {name for dataset in datasets for name in dataset.names}
    ordered = sorted(datasets[0].source.names("train"))
    return [row for row, name in enumerate(ordered) if name not in used]


def summarize(stream: Stream) -> StreamSummary:
    """Content of a stream, ready for JSON.

    Each task has its name, classes and numbers of images. For train, validation and test it has the number of images
    that show each class *after* the label table of the task (by class name; label 0 by the background's name).
    ``without_images`` lists annotated classes that no training image shows.
    """
    space = stream.space
    # tasks of one source share its presence matrix, which takes longest to get
    memory: dict[tuple[int, str], _Known] = {}
    tasks: list[TaskSummary] = []
    for task in stream.tasks:
        views = _views(task)
        shown = {
            split: None if group is None else {name: _histogram(v, space, memory) for name, v in group.items()}
            for split, group in views.items()
        }
        annotated = [space.name(c) for c in task.seen if c in task.annotated]
        in_training = (shown["train"] or {})["train"]
        tasks.append(
            {
                "index": task.index,
                "name": task.name,
                "new": [space.name(c) for c in task.new],
                "annotated": annotated,
                "recurs": task.recurs,
                "images": {
                    split: None if group is None else {name: len(v) for name, v in group.items()}
                    for split, group in views.items()
                },
                "shown_by_images": shown,
                "without_images": [name for name in annotated if name not in in_training],
            }
        )
    taught = {c for task in stream.tasks for c in task.seen}
    left_out = [c.name for c in space.classes if c.id not in taught]
    without = ""
    try:
        for task in stream.tasks:
            if task.data is not None:
                task.data.validation()
    except AbsentSplitError as error:
        without = error.what
    return {
        "protocol": stream.protocol,
        "validation": without,
        "classes": len(taught),
        "left_out": left_out,
        "tasks": tasks,
    }


def class_images(task: Task) -> dict[int, int]:
    """Number of training images that show each class which a task teaches, by id; reads masks (cached) only."""
    if task.data is None:
        raise UsageError(f"task '{task.name}' has no data attached", "build the stream from its data set")
    shown = _histogram(task.data.train(), task.space, {})
    return {c: shown.get(task.space.name(c), 0) for c in task.new}


def shows_a_class(task: Task) -> bool:
    """Whether a training image shows any class that the task annotates; reads masks (cached) only."""
    if task.data is None:
        raise UsageError(f"task '{task.name}' has no data attached", "build the stream from its data set")
    shown = _histogram(task.data.train(), task.space, {})
    return any(shown.get(task.space.name(c), 0) for c in task.annotated)


def distinct_class_images(task: Task) -> dict[int, int]:
    """As :func:`class_images`, but copies of an image count once. Reads every training image of the task."""
    if task.data is None:
        raise UsageError(f"task '{task.name}' has no data attached", "build the stream from its data set")
    seen: dict[int, set[bytes]] = {c: set() for c in task.new}
    for dataset in members(task.data.train()):
        presence = cached_presence(dataset.source, dataset.split)
        rows = {name: row for row, name in enumerate(dataset.source.names(dataset.split))}
        for name in dataset.names:
            shown = seen.keys() & {int(label) for label in dataset.table[np.flatnonzero(presence[rows[name]])]}
            if shown:
                image = dataset.source.image(dataset.split, name)
                content = hashlib.blake2b(f"{image.shape} {image.dtype}".encode() + image.tobytes(), digest_size=16)
                for class_id in shown:
                    seen[class_id].add(content.digest())
    return {class_id: len(contents) for class_id, contents in seen.items()}


def _views(task: Task) -> dict[str, Mapping[str, Samples] | None]:
    """All data sets of a task by split and name. Only sizes and lists are used; reading samples would raise."""
    data = task.data
    if data is None:
        raise UsageError(f"task '{task.name}' has no data attached", "build the stream from its data set")
    validation: dict[str, Samples] | None = None
    with suppress(AbsentSplitError):  # a data set without a validation split can be learned
        validation = {"validation": data.validation()}
    return {"train": {"train": data.train()}, "validation": validation, "test": data.tests()}


def _histogram(samples: Samples, space: LabelSpace, memory: dict[tuple[int, str], _Known]) -> dict[str, int]:
    """Number of images that show each class after the label table, by class name; IGNORE is left out."""
    counts = dict.fromkeys((BACKGROUND, *space.ids), 0)
    for dataset in members(samples):
        key = (id(dataset.source), dataset.split)
        if key not in memory:
            rows = {name: row for row, name in enumerate(dataset.source.names(dataset.split))}
            memory[key] = _Known(dataset.source, cached_presence(dataset.source, dataset.split), rows)
        known = memory[key]
        chosen = known.presence[[known.row_of[name] for name in dataset.names]]
        for label in counts:
            counts[label] += int(chosen[:, np.flatnonzero(dataset.table == label)].any(1).sum())
    return {space.name(label): count for label, count in counts.items() if count}
