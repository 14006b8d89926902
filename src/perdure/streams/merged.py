"""All tasks of a stream as one task, for joint training (upper bound)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from perdure.data.dataset import Dataset
from perdure.data.source import Image, Kind, Mask, Split
from perdure.errors import DataError, UsageError
from perdure.labels import BACKGROUND, LabelSpace, remap_table
from perdure.streams.task import Stream, TaskData, TaskSpec, make_stream


def merged(stream: Stream) -> Stream:
    """Stream of one task that teaches every class from the images of all tasks, with all their labels.

    ``groups`` are those of ``stream``, so figures of old and new classes have the same definition in both.

    Raises:
        UsageError: The data sets of the tasks do not annotate each other's classes, so that merged labels would
            contain false background.
    """
    last = stream.tasks[-1]
    annotated = frozenset().union(*(task.annotated for task in stream.tasks))

    def data(check: Callable[[], None]) -> TaskData:
        def joined(split: Split) -> Dataset:
            return join([_joint(task.data, split) for task in stream.tasks if task.data], stream.space, check)

        return TaskData(lambda: joined("train"), lambda: joined("val"), last.tests, joined)

    described_only = any(task.data is None for task in stream.tasks)
    closed = [task.name for task in stream.tasks if task.data is not None and task.data.joint is None]
    if closed:
        raise UsageError(
            f"tasks cannot be merged: images of task '{closed[0]}' may show classes that it does not label",
            "set elsewhere=absent if its images cannot show classes of the other data sets",
        )
    spec = TaskSpec("joint", last.seen, annotated, False, None if described_only else data)
    return make_stream(stream.space, [spec], f"{stream.protocol}, merged", stream.groups)


def _joint(data: TaskData, split: Split) -> Dataset:
    if data.joint is None:
        raise UsageError("a task without merged labels was merged")
    return data.joint(split)


def join(views: Sequence[Dataset], space: LabelSpace, check: Callable[[], None] | None) -> Dataset:
    """One data set from several. With one source and label table, each image occurs once, in source order."""
    first = views[0]
    if all(v.source is first.source and np.array_equal(v.table, first.table) for v in views):
        chosen = {name for view in views for name in view.names}
        names = tuple(name for name in first.source.names(first.split) if name in chosen)
        return replace(first, names=names, check=check)
    source = JoinedSource(views, space)
    return Dataset(
        source,
        first.split,
        tuple(source.names(first.split)),
        remap_table(space.ids, BACKGROUND),
        first.transform,
        check,
    )


class JoinedSource:
    """Samples of several data sets as one source, in global labels. Names are ``K/NAME`` with the data set's number K.

    Args:
        views: Data sets of one split.
        space: The label space of their tables' values.
    """

    def __init__(self, views: Sequence[Dataset], space: LabelSpace) -> None:
        # without their checks: the data set on this source has the check of its own stream
        self._views = tuple(replace(view, check=None) for view in views)
        self._split = views[0].split
        self.name = "+".join(dict.fromkeys(view.source.name for view in views))
        self.kind: Kind = views[0].source.kind
        self.space = space
        self.patients = any(view.source.patients for view in views)
        self.other_label = BACKGROUND

    def names(self, split: Split) -> Sequence[str]:
        """Names of all samples, one data set after the other."""
        if split != self._split:
            raise DataError(f"{self.name}: joined from split {self._split}, not {split}")
        return [f"{k}/{name}" for k, view in enumerate(self._views) for name in view.names]

    def image(self, split: Split, name: str) -> Image:
        """See :class:`~perdure.data.source.Source`."""
        view, own = self._find(split, name)
        return view.source.image(split, own)

    def mask(self, split: Split, name: str) -> Mask:
        """Label in global ids: a map, or one number in classification."""
        view, own = self._find(split, name)
        return np.asarray(view.table[view.source.mask(split, own)])

    def fingerprint(self, split: Split) -> str:
        """Digest of the data sets' sources, tables and names."""
        digest = hashlib.blake2b(digest_size=20)
        for view in self._views:
            digest.update(view.source.fingerprint(split).encode())
            digest.update(view.table.tobytes())
            digest.update("\0".join(view.names).encode())
        return digest.hexdigest()

    def _find(self, split: Split, name: str) -> tuple[Dataset, str]:
        number, _, own = name.partition("/")
        if split != self._split or not number.isdecimal() or int(number) >= len(self._views):
            raise DataError(f"{self.name}: no sample '{name}' in split {split}")
        return self._views[int(number)], own
