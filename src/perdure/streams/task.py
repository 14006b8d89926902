"""Tasks and streams; training data can be read only while its task is open. All tasks as one, for joint training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from perdure.data.dataset import Dataset, Joined, Samples, members
from perdure.data.preparation import Preparation
from perdure.data.source import Measured, Split
from perdure.errors import SealedDataError
from perdure.labels import ChannelMap, LabelSpace


@dataclass(frozen=True)
class TaskData:
    """Functions that open the data of a task. Nothing is read until a data set is indexed.

    Attributes:
        train: Training set of this task.
        validation: Validation set of this task.
        tests: Test sets, by name, for *all* classes seen so far: one in class-incremental streams, one per task in
            task-incremental ones. Of the validation split where the stream is measured on that.
        joint: The task's ``"train"`` or ``"val"`` images with all their labels, for upper bounds only
            (:func:`merged`).
        pool: Unlabelled images that may show any class seen so far. ``None`` unless the protocol grants them.
        prepare: Writes the working files that training reads, into a folder, telling each case that is done; ``None``
            where nothing has to be written.
    """

    train: Callable[[], Samples]
    validation: Callable[[], Samples]
    tests: Callable[[], dict[str, Dataset]]
    joint: Callable[[Split], Samples]
    pool: Callable[[], Dataset] | None = None
    prepare: Callable[[Path, Callable[[], None]], None] | None = None


@dataclass(frozen=True)
class Task:
    """One step of a stream.

    Args:
        index: Position in the stream, from 0.
        name: Short name for folders and tables, e.g. ``"16"`` or ``"sheep"``.
        new: Global ids of the classes this task teaches, in learning order.
        old: Ids of all classes of earlier tasks, in learning order.
        annotated: Ids that are annotated in this task's training data (partial labels). Other classes may occur in the
            images, labelled as background.
        recurs: True if images of other tasks may recur here with other labels (overlap).
        preparation: How a case becomes the network's input, and how predictions return to the case's grid.
        space: All classes of the stream with their names and kinds, for methods that are told what a class is called.
        data: Opens its data; ``None`` for a task that is only described (prediction).
    """

    index: int
    name: str
    new: tuple[int, ...]
    old: tuple[int, ...]
    annotated: frozenset[int]
    recurs: bool = False
    preparation: Preparation = field(default_factory=Preparation)
    space: LabelSpace = field(default_factory=lambda: LabelSpace(()))
    data: TaskData | None = None
    _gate: _Gate | None = field(default=None, repr=False, compare=False)

    @property
    def seen(self) -> tuple[int, ...]:
        """Old and new classes in learning order: the channels of a network after this task."""
        return self.old + self.new

    @property
    def channels(self) -> ChannelMap:
        """Class <-> channel map after this task."""
        return ChannelMap(self.seen)

    def train(self) -> Samples:
        """Training data. Raises :class:`SealedDataError` unless this is the current task."""
        return self._open().train()

    def validation(self) -> Samples:
        """Validation set with the new classes, for figures during training."""
        return self._open().validation()

    def tests(self) -> dict[str, Dataset]:
        """Sets that figures are measured on, for all classes seen so far, by name."""
        return self._open(training=False).tests()  # test sets of earlier tasks stay readable: they are not trained on

    def pool(self) -> Dataset | None:
        """Unlabelled images of the classes seen so far (all labels are ``IGNORE``), if the protocol grants any."""
        opener = self._open().pool
        return None if opener is None else opener()

    def _open(self, training: bool = True) -> TaskData:
        if self.data is None:
            raise SealedDataError(
                f"task '{self.name}' has no data attached", "give the data set's folder: data.root=PATH"
            )
        if training and self._gate is not None:
            self._gate.check(self.index)
        return self.data


@dataclass
class _Gate:
    """Which task is open. Data sets hold a check bound to it, so one that a method kept raises after its task."""

    current: int | None = None

    def check(self, index: int) -> None:
        if self.current != index:
            state = "no task is open" if self.current is None else f"task {self.current + 1} is open"
            raise SealedDataError(
                f"training data of task {index + 1} was opened while {state}",
                "a method may read only data of the current task; retain what it needs of earlier tasks as Kept items",
            )


@dataclass(frozen=True)
class Stream:
    """An ordered list of tasks and the protocol that made it.

    Args:
        space: All classes of the data.
        tasks: The tasks in order, each attached to this stream's gate by :func:`make_stream`.
        protocol: Short description, e.g. ``"class-incremental 15-1 overlap"``.
        groups: Classes by the task that teaches them. In a merged stream (joint training) they are those of the
            original stream, so that figures of old and new classes have the same definition.
        measured: The split that ``tests`` of its tasks are taken from.
    """

    space: LabelSpace
    tasks: tuple[Task, ...]
    protocol: str
    groups: tuple[tuple[int, ...], ...]
    _gate: _Gate = field(repr=False, compare=False)
    measured: Measured = "test"

    def __len__(self) -> int:
        return len(self.tasks)

    @contextmanager
    def opened(self, task: Task) -> Iterator[Task]:
        """Make ``task`` the current one: only its training data can be read."""
        self._gate.current = task.index
        try:
            yield task
        finally:
            self._gate.current = None


@dataclass(frozen=True)
class TaskSpec:
    """Description of one task, before it is bound to a stream.

    ``data`` receives the check that its data sets must call before every read.
    """

    name: str
    new: tuple[int, ...]
    annotated: frozenset[int]
    recurs: bool
    preparation: Preparation = field(default_factory=Preparation)
    data: Callable[[Callable[[], None]], TaskData] | None = None


def make_stream(
    space: LabelSpace,
    specs: Sequence[TaskSpec],
    protocol: str,
    groups: Sequence[tuple[int, ...]] | None = None,
    measured: Measured = "test",
) -> Stream:
    """Bind task descriptions to one gate. Raises UsageError if a class is taught twice."""
    gate = _Gate()
    old: tuple[int, ...] = ()
    tasks: list[Task] = []
    for index, spec in enumerate(specs):
        ChannelMap(old + spec.new)
        check = partial(gate.check, index)  # a partial, not a closure: spawned loader workers receive data sets pickled
        data = spec.data(check) if spec.data is not None else None
        tasks.append(
            Task(index, spec.name, spec.new, old, spec.annotated, spec.recurs, spec.preparation, space, data, gate)
        )
        old += spec.new
    return Stream(space, tuple(tasks), protocol, tuple(groups or (s.new for s in specs)), gate, measured)


def merged(stream: Stream) -> Stream:
    """Stream of one task that teaches every class from the images of all tasks, with all their labels (upper bound).

    ``groups`` are those of ``stream``, so figures of old and new classes have the same definition in both. Data sets
    that do not annotate each other's classes can be merged, because each sample records its annotated classes.
    """
    last = stream.tasks[-1]
    opened = [task.data for task in stream.tasks if task.data is not None]

    def data(check: Callable[[], None]) -> TaskData:
        def joined(split: Split) -> Samples:
            datasets = [dataset for part in opened for dataset in members(part.joint(split))]
            first = datasets[0]
            if any(d.source is not first.source or not np.array_equal(d.table, first.table) for d in datasets):
                return Joined(tuple(replace(dataset, check=check) for dataset in datasets))
            # with one source and label table an image that recurs in several tasks is taken once
            chosen = {name for dataset in datasets for name in dataset.names}
            names = tuple(name for name in first.source.names(first.split) if name in chosen)
            return replace(first, names=names, check=check)

        def prepare(folder: Path, advance: Callable[[], None]) -> None:
            for part in opened:
                if part.prepare is not None:
                    part.prepare(folder, advance)

        return TaskData(partial(joined, "train"), partial(joined, "val"), last.tests, joined, prepare=prepare)

    annotated = frozenset().union(*(task.annotated for task in stream.tasks))
    complete = len(opened) == len(stream.tasks)  # a stream that is only described (prediction) has no data to merge
    spec = TaskSpec("joint", last.seen, annotated, False, last.preparation, data if complete else None)
    return make_stream(stream.space, [spec], f"{stream.protocol}, merged", stream.groups, stream.measured)
