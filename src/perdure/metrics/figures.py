"""Named figures, computed from counts. Definitions stand in :mod:`perdure.metrics.definitions`.

Nothing here is ever NaN: a figure that does not exist is ``Value(None, 0)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from perdure.data.source import Kind
from perdure.errors import DataError, PerdureError, UsageError
from perdure.labels import BACKGROUND
from perdure.metrics import continual
from perdure.metrics.cases import CaseTable
from perdure.metrics.confusion import ConfusionMatrix, pooled
from perdure.metrics.continual import Gone, Impossible, KeptCounts, TaskDice
from perdure.metrics.definitions import Figure, figure, fitting
from perdure.metrics.numbers import TaskNumbers
from perdure.streams.description import DescribedStream

Floats = npt.NDArray[np.float64]
Row = list[float | None]


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
_DIGITS: Final = 6
"""After the point, of means over cases: a sum in another order gives the same file."""
_AVERAGED: Final = {
    "miou.average": "miou.all",
    "dice.average": "dice.all",
    "accuracy.average": "accuracy.all",
    "balanced.average": "accuracy.mean",
}
"""Figure whose mean over tasks it is."""
_BY_CLASS: Final = {
    "miou.all": "iou",
    "miou.old": "iou",
    "miou.new": "iou",
    "dice.all": "dice",
    "accuracy.all": "accuracy",
    "accuracy.mean": "recall",
}
"""What a figure of a task takes of each class: see :func:`_over_classes`."""


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
    """

    stream: DescribedStream
    counts: Mapping[int, ConfusionMatrix]
    reference: RunResults | None = None
    gone: Mapping[int, tuple[Gone, ...]] = field(default_factory=dict)
    cases: Mapping[int, CaseTable] = field(default_factory=dict)
    kept: Mapping[int, KeptCounts] = field(default_factory=dict)
    alone: RunResults | None = None
    numbers: Mapping[int, TaskNumbers] = field(default_factory=dict)

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
    return RunResults(stream, counts, reference, _gone(counts_by_task), cases or {}, kept or {}, numbers=numbers or {})


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


def headline(stream: DescribedStream) -> list[str]:
    """Full names of the figures that stand first in a report of this stream."""
    names = ["miou.all", "miou.old", "miou.new", "hiou", "forgetting[max-last]", "miou.average"]
    if stream.kind == "classification":
        names = ["accuracy.all", "accuracy.mean", "forgetting[max-last,of=accuracy]", "accuracy.average"]
    return [str(figure(name, background=stream.background is not None)) for name in names]


def measured_tasks(results: RunResults, after: int) -> list[tuple[int, float]]:
    """Where test sets are gone: each task that is measured all the same, with Dice (or accuracy) in percent.

    Dice is d[t][j], over the structures that task j annotates on its own test cases; accuracy is that of its classes.
    """
    found: list[tuple[int, float]] = []
    accuracy = group_matrix(results, "accuracy").get(after, []) if results.stream.kind == "classification" else None
    for j in range(after + 1 if results.gone.get(after) else 0):
        if accuracy is None:
            with suppress(Impossible):
                found.append((j, results.task_dice.of(after, j)))
        elif (value := accuracy[j]) is not None:
            found.append((j, value))
    return found


def missing_tests(results: RunResults, after: int) -> str:
    """Which test cases of earlier tasks were not at hand, in a few words; empty if none."""
    called = {task.name: task.called for task in results.stream.tasks}
    names = [called.get(g.name, g.name) + (" (in part)" if g.left else "") for g in results.gone.get(after, ())]
    return f"test cases of {', '.join(names)} not at hand" if names else ""


def class_values(name: str, counts: ConfusionMatrix) -> dict[int, Value]:
    """One value for each label, 0 included: ``iou``, ``dice``, ``recall`` or ``precision`` in percent."""
    values, support = _by_class(name, counts)
    return {
        label: Value(None if np.isnan(v) else float(v), int(n))
        for label, v, n in zip(counts.labels, values, support, strict=True)
    }


def at_zero(counts: ConfusionMatrix, ids: Iterable[int], kind: Kind) -> list[int]:
    """Those of the classes whose IoU (recall in classification) is 0.0, though the ground truth holds them."""
    values = class_values("recall" if kind == "classification" else "iou", counts)
    return [c for c in ids if (value := values[c].value) is not None and value < 0.05]  # pages write that as 0.0


def evaluate(wanted: Figure | str, results: RunResults, after: int) -> Value:
    """Value of a figure after a task.

    Raises:
        UsageError: The figure has one value per class (use :func:`class_values`), or is not for this kind of labels.
        PerdureError: The figure is defined but not computed.
    """
    fig = figure(wanted, results.stream.background is not None) if isinstance(wanted, str) else wanted
    fitting(fig, results.stream.kind)
    if fig.definition.scope == "class":
        raise UsageError(f"'{fig}' has one value for each class", "ask for miou.all, dice.all or accuracy.mean instead")
    if after not in results.counts:
        return UNDEFINED
    if fig.definition.scope == "case":
        return case_values(fig, results, after)[None]
    if fig.definition.name in _OF_DICE:
        return _of_dice(fig, results, after)
    # means over tasks and R[t][j] take the counts of all tasks so far
    first = after if fig.definition.scope == "task" else 0
    for gone in (gone for t in range(first, after + 1) for gone in results.gone.get(t, ())):
        return NotComputable(gone.why(results.stream))
    return (_task_figure if fig.definition.scope == "task" else _stream_figure)(fig, results, after)


def case_values(wanted: Figure | str, results: RunResults, after: int) -> dict[int | None, Value]:
    """A figure over the cases after a task: of each label, and under ``None`` of the model."""
    fig = figure(wanted) if isinstance(wanted, str) else wanted
    name, nothing = fig.definition.name.removesuffix(".cases"), UNDEFINED
    table, stream = results.cases.get(after), results.stream
    if table is None:
        nothing = NotComputable(f"the cases after task {after + 1} were not recorded")
    elif "tolerance" in fig.choices and float(fig.choices["tolerance"]) != results.stream.tolerance:
        nothing = NotComputable(f"the run was measured with evaluate.tolerance={results.stream.tolerance:g}")
    elif "unit" in fig.choices and not np.isfinite(table.values[..., 1]).any():
        nothing = NotComputable("the spacing of the images is not known in mm")
    values: dict[int | None, Value] = dict.fromkeys((None, *results.counts[after].labels), nothing)
    if table is None or nothing is not UNDEFINED:
        return values
    found = table.statistics(name)
    chosen = {"mean": found.mean, "sd": found.sd, "ci-low": found.low, "ci-high": found.high}[fig.choices["statistic"]]
    for label, value, n in zip((*table.labels, None), chosen.tolist(), found.n.tolist(), strict=True):
        values[label] = UNDEFINED if np.isnan(value) else Value(value, n)
    for gone in results.gone.get(after, ()):
        for label in values if gone.labels is None else {None, *gone.labels} & values.keys():
            values[label] = NotComputable(gone.why(stream))
    return values


_OF_DICE: Final[Mapping[str, Callable[[Figure, RunResults, int], list[float]]]] = {
    "dice.tasks": lambda _, r, t: continual.average_dice(r.task_dice, t),
    "wcd": lambda _, r, t: continual.whole_class(r.cases.get(t), r.stream.tasks[t].seen, t),
    "bwtr": lambda _, r, t: continual.relative_backward(r.task_dice, t),
    "rma": lambda _, r, t: continual.plasticity(r.task_dice, r.alone.task_dice if r.alone else None, t),
    "e-fwt": lambda _, r, t: continual.forward(r.task_dice, r.numbers, t),
    "fwt": lambda _, r, t: continual.told_by_name(r.stream, r.numbers, t),
    "mpe": lambda _, r, t: continual.growth(r.kept, t),
    "drr": lambda _, r, t: continual.replay(r.stream, r.kept, r.numbers, t),
    "forgetting.appearance": lambda f, r, t: continual.lost(r.task_dice, t, True, f.choices["rule"]),
    "forgetting.semantics": lambda f, r, t: continual.lost(r.task_dice, t, False, f.choices["rule"]),
}
"""Terms whose mean a figure of continual segmentation is."""


def _of_dice(fig: Figure, results: RunResults, after: int) -> Value:
    """A figure of continual segmentation, or why it is none."""
    if fig.definition.scope == "stream" and not after:
        return UNDEFINED  # it compares tasks
    if fig.definition.name == "wcd":
        for gone in results.gone.get(after, ()):
            return NotComputable(gone.why(results.stream))
    try:
        terms = _OF_DICE[fig.definition.name](fig, results, after)
    except Impossible as error:
        return NotComputable(str(error))
    return Value(round(continual.mean(terms), _DIGITS), len(terms))


def group_matrix(results: RunResults, of: str = "miou") -> dict[int, Row]:
    """R: for each measured task t the figure of each group j of classes, ``None`` where it was not measured.

    Args:
        results: The run.
        of: ``miou``, ``dice``, ``accuracy`` or ``balanced``, in percent, without label 0; absent classes are left out.
    """
    by_class = {"miou": "iou", "dice": "dice", "balanced": "recall", "accuracy": "accuracy"}
    matrix: dict[int, Row] = {}
    for t, counts in results.counts.items():
        row: Row = []
        gone = [gone.labels for gone in results.gone.get(t, ())]
        for group in results.stream.groups:
            known = all(c in counts.labels for c in group)
            # without one of their test sets the classes' figure would be of other images than before
            known &= not any(labels is None or labels & set(group) for labels in gone)
            row.append(_over_classes(by_class[of], counts, group).value if known else None)
        matrix[t] = row
    return matrix


def forgetting_by_group(rows: Mapping[int, Row], after: int, rule: str = "max-last") -> list[float | None]:
    """Points lost on each group taught before task ``after``; see the definition of ``forgetting``."""
    lost: list[float | None] = []
    for j in range(min(after, len(rows.get(after, [])))):
        last = rows[after][j]
        first = rows[j][j] if j in rows else None
        earlier = [r for t, row in rows.items() if t < after and (r := row[j]) is not None]
        if last is None or first is None or not earlier:
            lost.append(None)
        elif rule == "first-last":
            lost.append(first - last)
        else:
            lost.append(max(earlier if rule == "max-last" else [*earlier, last]) - last)
    return lost


def _by_class(name: str, counts: ConfusionMatrix) -> tuple[Floats, Floats]:
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


def _over_classes(name: str, counts: ConfusionMatrix, ids: Iterable[int], absent: str = "skip") -> Value:
    """One figure of several classes: the mean of a figure of each class, or ``accuracy``.

    Args:
        name: A figure of one class, see :func:`class_values`; or ``accuracy``, the share of what shows these classes
            that is labelled right, in percent.
        counts: Counts after the task.
        ids: The classes.
        absent: ``zero`` lets a class without ground truth count 0, ``skip`` leaves it out.
    """
    at = [counts.labels.index(c) for c in ids]
    if name == "accuracy":
        total = int(counts.truth[at].sum())
        return Value(100.0 * int(np.diagonal(counts.matrix)[at].sum()) / total, total) if total else UNDEFINED
    values = _by_class(name, counts)[0][at]
    values = np.nan_to_num(values, nan=0.0) if absent == "zero" else values[~np.isnan(values)]
    return Value(float(values.mean()), len(values)) if len(values) else UNDEFINED


def _task_figure(fig: Figure, results: RunResults, after: int) -> Value:
    counts, stream = results.counts[after], results.stream
    name, seen = fig.definition.name, stream.tasks[after].seen
    if name == "hiou":
        bg, absent = fig.choices["bg"], fig.choices["absent"]
        old = evaluate(f"miou.old[bg={bg},absent={absent}]", results, after)
        new = evaluate(f"miou.new[bg={'out' if bg == 'in' else bg},absent={absent}]", results, after)
        if old.value is None or new.value is None:
            return UNDEFINED
        both = old.value + new.value
        return Value(2 * old.value * new.value / both if both else 0.0, old.n + new.n)
    if fig.choices.get("bg") == "ignored":
        counts = counts.without_background()
    label_0 = (BACKGROUND,) if fig.choices.get("bg") == "in" else ()
    base = tuple(c for c in stream.groups[0] if c in seen)
    later = tuple(c for group in stream.groups[1:] for c in group if c in seen)
    if name in ("miou.old", "miou.new") and not later:
        return UNDEFINED
    if name not in _BY_CLASS:
        raise not_computed(fig)
    ids = {"miou.old": label_0 + base, "miou.new": later}.get(name, label_0 + seen)
    return _over_classes(_BY_CLASS[name], counts, ids, fig.choices.get("absent", "skip"))


def _stream_figure(fig: Figure, results: RunResults, after: int) -> Value:
    """Figures over tasks: means over R[t][j], of which each rule takes its own cells and what is subtracted."""
    name = fig.definition.name
    if name in _AVERAGED:
        options = ",".join(f"{key}={value}" for key, value in fig.choices.items())
        values = [evaluate(f"{_AVERAGED[name]}[{options}]", results, t).value for t in range(after + 1)]
        return UNDEFINED if None in values else _mean(values)  # a mean over some of the tasks is another figure
    if name not in ("forgetting", "bwt", "intransigence"):
        raise not_computed(fig)
    of = fig.choices["of"]
    rows = {t: row for t, row in group_matrix(results, of).items() if t <= after}
    if name == "forgetting":
        return _mean(forgetting_by_group(rows, after, fig.choices["rule"]))

    def cell(t: int, j: int) -> float | None:
        row = rows.get(t, [])
        return row[j] if j < len(row) else None

    later = range(1, after + 1)
    pairs: list[tuple[float | None, float | None]]
    if name == "bwt":
        measured = later if fig.choices["rule"] == "all-pairs" else [after]
        pairs = [(cell(i, j), cell(j, j)) for i in measured for j in range(i)]
    else:
        joint = results.reference
        if joint is None or joint.last is None or results.stream.merged:
            return UNDEFINED
        best = group_matrix(joint, of)[joint.last]
        pairs = [(best[j], cell(j, j)) for j in range(after + 1)]
    return _mean(None if a is None or b is None else a - b for a, b in pairs)


def not_computed(fig: Figure) -> PerdureError:
    """The error of a figure that has a definition and nothing else: no other figure's value may stand for it."""
    return PerdureError(f"the figure '{fig}' is defined but not computed", "ask for one of `perdure list metrics`")


def _mean(values: Iterable[float | None]) -> Value:
    """Mean of what exists."""
    known = [v for v in values if v is not None]
    return Value(sum(known) / len(known), len(known)) if known else UNDEFINED
