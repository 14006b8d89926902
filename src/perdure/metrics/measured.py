"""What a run measured: counts and cases after each task, which test sets were gone, and the values of each class.

Nothing here is ever NaN: a value that does not exist is ``Value(None, 0)``. Figures that compare classes or tasks:
:mod:`perdure.metrics.figures`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from perdure.data.source import Kind
from perdure.errors import DataError, PerdureError
from perdure.metrics.cases import CaseTable
from perdure.metrics.confusion import ConfusionMatrix, pooled
from perdure.metrics.continual import Gone, KeptCounts, TaskDice
from perdure.metrics.definitions import Figure, figure
from perdure.metrics.numbers import TaskNumbers
from perdure.streams.description import DescribedStream

Floats = npt.NDArray[np.float64]


class Value(NamedTuple):
    """A figure's value, ``None`` where it does not exist, and over how many things it was taken.

    ``n`` counts ground-truth pixels (images in classification) for a class and for accuracy, predicted ones for
    precision, classes for means over classes, tasks or pairs of tasks for figures of a stream, cases for figures over
    cases.
    """

    value: float | None
    n: int

    @property
    def why(self) -> str:
        """Why there is no value, where more can be said than that nothing was there to measure."""
        return ""


class NotComputable(Value):
    """No value, and the reason."""

    reason: str

    def __new__(cls, reason: str) -> Self:
        """A value of nothing, equal to any other one, that knows the reason."""
        made = super().__new__(cls, None, 0)
        made.reason = reason
        return made

    @property
    def why(self) -> str:
        """The reason."""
        return self.reason


UNDEFINED: Final = Value(None, 0)


@dataclass(frozen=True)
class RunResults:
    """What figures of a run are computed from.

    Args:
        stream: Which task teaches what.
        counts: Confusion matrices pooled over the test sets that were there, by the task after which they were taken.
        reference: Results of a joint run over the same groups, for intransigence.
        gone: Test sets that earlier tasks were measured on and this one was not, by task.
        cases: Figures of single cases, by task; of runs that recorded them.
        kept: What sealed tasks keep, by task.
        alone: Results of a model per task on the same stream (method ``independent``), for plasticity.
        numbers: What else was measured or counted of tasks, by task.
        tested: Number of cases of each test set, by its name, by the task after which they were measured.
    """

    stream: DescribedStream
    counts: Mapping[int, ConfusionMatrix]
    reference: RunResults | None = None
    gone: Mapping[int, tuple[Gone, ...]] = field(default_factory=dict)
    cases: Mapping[int, CaseTable] = field(default_factory=dict)
    kept: Mapping[int, KeptCounts] = field(default_factory=dict)
    alone: RunResults | None = None
    numbers: Mapping[int, TaskNumbers] = field(default_factory=dict)
    tested: Mapping[int, Mapping[str, int]] = field(default_factory=dict)

    @property
    def last(self) -> int | None:
        """The latest task that was measured."""
        return max(self.counts, default=None)

    @property
    def task_dice(self) -> TaskDice:
        """d[t][j] of the run."""
        return TaskDice(self.stream, self.cases, self.gone)

    def class_values(self, name: str, after: int) -> dict[int, Value]:
        """:func:`class_values` after a task; no value for classes that a test set labels which is gone.

        Counts of other test sets are another measurement, and would be compared with those of before.
        """
        values = class_values(name, self.counts[after])
        for gone in self.gone.get(after, ()):
            for label in values if gone.labels is None else gone.labels & values.keys():
                values[label] = NotComputable(gone.why(self.stream))
        return values


def run_results(
    stream: DescribedStream,
    counts_by_task: Mapping[int, Mapping[str, ConfusionMatrix]],
    reference: RunResults | None = None,
    cases: Mapping[int, CaseTable] | None = None,
    kept: Mapping[int, KeptCounts] | None = None,
    numbers: Mapping[int, TaskNumbers] | None = None,
) -> RunResults:
    """Pool the test sets of each task, and find out which of them are no longer there.

    Raises:
        DataError: There are counts of a task that the stream does not have, or they lack a class learned by then.
    """
    counts: dict[int, ConfusionMatrix] = {}
    for t in sorted(counts_by_task):
        if not 0 <= t < len(stream.tasks):
            raise DataError(f"there are counts after task {t + 1}, but the stream has {len(stream.tasks)} tasks")
        counts[t] = pooled(counts_by_task[t])
        # counts over fewer classes would still give figures, and better ones
        lacking = [c for c in stream.tasks[t].seen if c not in counts[t].labels]
        if lacking:
            raise DataError(f"the counts after task {t + 1} lack class {lacking[0]}, which was learned by then",
                            "counts.json of this task was changed or is damaged: restore it")  # fmt: skip
    tested = {t: {name: one.cases for name, one in sets.items()} for t, sets in counts_by_task.items()}
    gone = _gone(counts_by_task)
    return RunResults(stream, counts, reference, gone, cases or {}, kept or {}, None, numbers or {}, tested)


def _gone(counts_by_task: Mapping[int, Mapping[str, ConfusionMatrix]]) -> dict[int, tuple[Gone, ...]]:
    """Test sets of earlier tasks that a later one was not measured on, or on fewer cases: by task."""
    known: dict[str, ConfusionMatrix] = {}
    gone: dict[int, tuple[Gone, ...]] = {}
    for t, sets in sorted(counts_by_task.items()):
        lacking = [name for name, before in known.items() if name not in sets or sets[name].cases < before.cases]
        if lacking:
            left = {name: sets[name].cases if name in sets else 0 for name in lacking}
            gone[t] = tuple(Gone(name, known[name].annotated, left[name]) for name in lacking)
        known |= {name: counts for name, counts in sets.items() if name not in lacking}
    return gone


def missing_tests(results: RunResults, after: int) -> str:
    """Which test cases of earlier tasks were not at hand, in a few words; empty if none."""
    called = {task.name: task.called for task in results.stream.tasks}
    names = [called.get(g.name, g.name) + (" (in part)" if g.left else "") for g in results.gone.get(after, ())]
    return f"test cases of {', '.join(names)} not at hand" if names else ""


def class_values(name: str, counts: ConfusionMatrix) -> dict[int, Value]:
    """One value for each label, 0 included: ``iou``, ``dice``, ``recall`` or ``precision`` in percent."""
    values, support = percentages(name, counts)
    return {
        label: Value(None if np.isnan(v) else float(v), int(n))
        for label, v, n in zip(counts.labels, values, support, strict=True)
    }


def at_zero(counts: ConfusionMatrix, ids: Iterable[int], kind: Kind) -> list[int]:
    """Those of the classes whose IoU (recall in classification) is 0.0, though the ground truth holds them."""
    values = class_values("recall" if kind == "classification" else "iou", counts)
    return [c for c in ids if (value := values[c].value) is not None and value < 0.05]  # pages write that as 0.0


def percentages(name: str, counts: ConfusionMatrix) -> tuple[Floats, Floats]:
    """Percentages ``(K,)`` with NaN where undefined, and the number of pixels behind each."""
    right = np.diagonal(counts.matrix).astype(np.float64)
    truth, guess = counts.truth.astype(np.float64), counts.matrix.sum(0).astype(np.float64)
    parts = {
        "iou": (right, truth + guess - right, truth),
        "dice": (2 * right, truth + guess, truth),
        "recall": (right, truth, truth),
        "precision": (right, guess, guess),
    }
    if name not in parts:
        raise not_computed(figure(name))
    top, bottom, support = parts[name]
    values = np.full(len(right), np.nan)  # undefined without support, even where 0 / n would be a number
    np.divide(100.0 * top, bottom, out=values, where=support > 0)
    return values, support


def not_computed(fig: Figure) -> PerdureError:
    """The error of a figure that has a definition and nothing else: no other figure's value may stand for it."""
    return PerdureError(f"the figure '{fig}' is defined but not computed", "ask for one of `perdure list metrics`")
