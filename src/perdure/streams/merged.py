"""All tasks of a stream as one task, for joint training (upper bound)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from perdure.data.dataset import Dataset, Joined, Samples, members
from perdure.data.source import Split
from perdure.streams.task import Stream, TaskData, TaskSpec, make_stream


def merged(stream: Stream) -> Stream:
    """Stream of one task that teaches every class from the images of all tasks, with all their labels.

    ``groups`` are those of ``stream``, so figures of old and new classes have the same definition in both. Data sets
    that do not annotate each other's classes can be merged, because each sample records its annotated classes.
    """
    last = stream.tasks[-1]
    opened = [task.data for task in stream.tasks if task.data is not None]

    def data(check: Callable[[], None]) -> TaskData:
        def joined(split: Split) -> Samples:
            return join([dataset for part in opened for dataset in members(part.joint(split))], check)

        return TaskData(lambda: joined("train"), lambda: joined("val"), last.tests, joined)

    annotated = frozenset().union(*(task.annotated for task in stream.tasks))
    complete = len(opened) == len(stream.tasks)  # a stream that is only described (prediction) has no data to merge
    spec = TaskSpec("joint", last.seen, annotated, False, last.preparation, data if complete else None)
    return make_stream(stream.space, [spec], f"{stream.protocol}, merged", stream.groups)


def join(datasets: list[Dataset], check: Callable[[], None] | None) -> Samples:
    """One data set from several. With one source and label table, each image occurs once, in source order."""
    first = datasets[0]
    if all(d.source is first.source and np.array_equal(d.table, first.table) for d in datasets):
        chosen = {name for dataset in datasets for name in dataset.names}
        names = tuple(name for name in first.source.names(first.split) if name in chosen)
        return replace(first, names=names, check=check)
    return Joined(tuple(replace(dataset, check=check) for dataset in datasets))
