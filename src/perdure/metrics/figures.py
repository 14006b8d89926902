"""Named figures, computed from what was measured. Definitions stand in :mod:`perdure.metrics.definitions`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Final

import numpy as np

from perdure.errors import UsageError
from perdure.labels import BACKGROUND
from perdure.metrics import continual
from perdure.metrics.confusion import ConfusionMatrix
from perdure.metrics.continual import Impossible
from perdure.metrics.definitions import Figure, figure, fitting
from perdure.metrics.measured import UNDEFINED, NotComputable, RunResults, Value, not_computed, percentages
from perdure.streams.description import DescribedStream

Row = list[float | None]


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


def headline(stream: DescribedStream) -> list[str]:
    """Full names of the figures that stand first in a report of this stream."""
    names = ["miou.all", "miou.old", "miou.new", "hiou", "forgetting[max-last]", "miou.average"]
    if stream.kind == "classification":
        names = ["accuracy.all", "accuracy.mean", "forgetting[max-last,of=accuracy]", "accuracy.average"]
    elif stream.of_data_sets:
        # no mIoU: its background, most of a scan and always right, hides that a structure is lost
        names = [
            "dice.tasks",
            "dice.cases",
            "forgetting.semantics[max-last]",
            "forgetting.appearance[max-last]",
            "bwtr",
        ]
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
    values = percentages(name, counts)[0][at]
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


def _mean(values: Iterable[float | None]) -> Value:
    """Mean of what exists."""
    known = [v for v in values if v is not None]
    return Value(sum(known) / len(known), len(known)) if known else UNDEFINED
