"""Tasks and streams; training data can be read only while its task is open."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from perdure.data.dataset import Dataset, Samples
from perdure.data.preparation import Preparation
from perdure.data.source import Split
from perdure.errors import SealedDataError
from perdure.labels import ChannelMap, LabelSpace


@dataclass(frozen=True)
class TaskData:
    """Functions that open the data of a task. Nothing is read until a data set is indexed.

    Attributes:
        train: Training set of this task.
        validation: Validation set of this task.
        tests: Test sets, by name, for *all* classes seen so far: one in class-incremental streams, one per task in
            task-incremental ones.
        joint: The task's ``"train"`` or ``"val"`` images with all their labels, for upper bounds only
            (:func:`perdure.streams.merged.merged`).
        pool: Unlabelled images that may show any class seen so far. ``None`` unless the protocol grants them.
    """

    train: Callable[[], Samples]
    validation: Callable[[], Samples]
    tests: Callable[[], dict[str, Dataset]]
    joint: Callable[[Split], Samples]
    pool: Callable[[], Dataset] | None = None


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
        """Test sets for all classes seen so far, by name."""
        if self.data is None:
            raise SealedDataError(
                f"task '{self.name}' has no data attached", "give the data set's folder: data.root=PATH"
            )
        return self.data.tests()

    def pool(self) -> Dataset | None:
        """Unlabelled images of the classes seen so far (all labels are ``IGNORE``), if the protocol grants any."""
        opener = self._open().pool
        return None if opener is None else opener()

    def _open(self) -> TaskData:
        if self.data is None:
            raise SealedDataError(
                f"task '{self.name}' has no data attached", "give the data set's folder: data.root=PATH"
            )
        if self._gate is not None:
            self._gate.check(self.index)
        return self.data


@dataclass
class _Gate:
    """Which task is open. Data sets hold a check bound to it, so one that a method kept raises after its task."""

    current: int | None = None

    def check(self, index: int) -> None:
        if self.current != index:
            state = "no task is open" if self.current is None else f"task {self.current} is open"
            raise SealedDataError(
                f"training data of task {index} was opened while {state}",
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
    """

    space: LabelSpace
    tasks: tuple[Task, ...]
    protocol: str
    groups: tuple[tuple[int, ...], ...]
    _gate: _Gate = field(repr=False, compare=False)

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
    return Stream(space, tuple(tasks), protocol, tuple(groups or (s.new for s in specs)), gate)
