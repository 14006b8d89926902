"""Figures of continual medical segmentation, from the Dice of single cases.

d[t][j] is the Dice of task j after task t in percent: the mean, over the structures that task j annotates, of their
mean Dice over the cases of task j's own test set. Tasks count from 0 here. Every figure either has all values that its
definition names, or says why not: a mean over some of the tasks would be another figure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from perdure.metrics.cases import CaseCounts, CaseTable
from perdure.metrics.numbers import DIGITS, TaskNumbers
from perdure.streams.description import DescribedStream


class KeptCounts(NamedTuple):
    """What a sealed task keeps, for figures of memory.

    Args:
        parameters: Floating-point values in the weights.
        samples: Whether raw or synthetic samples are kept, which later tasks may replay.
    """

    parameters: int
    samples: bool


@dataclass(frozen=True)
class Gone:
    """A test set that an earlier task was measured on and a later one no more, or not on all of its cases.

    Args:
        name: The set.
        labels: Classes that it labels; ``None`` if all.
        left: Number of its cases that are still there.
    """

    name: str
    labels: frozenset[int] | None
    left: int = 0

    def why(self, stream: DescribedStream) -> str:
        """What a figure that needs the set says instead of a value."""
        task = next((task for task in stream.tasks if task.name == self.name), None)
        whose = f"the set '{self.name}'" if task is None else f"task '{task.called}'"
        return f"{'some of ' if self.left else ''}the test cases of {whose} are not at hand"


class Impossible(Exception):  # no error: a figure that cannot be computed, with the reason
    """A figure cannot be computed."""


@dataclass(frozen=True)
class TaskDice:
    """d[t][j] of a run.

    Args:
        stream: Which task annotates what.
        tables: Figures of cases by the task after which they were taken.
        gone: Test sets that are no longer there, by task.
    """

    stream: DescribedStream
    tables: Mapping[int, CaseTable]
    gone: Mapping[int, Sequence[Gone]]

    def own_set(self, j: int) -> str:
        """Name of task j's own test set: that of its name, or the only one of a stream with one set for all tasks."""
        name = self.stream.tasks[j].name
        sets = set[str]().union(*(table.sets for table in self.tables.values()))
        if name in sets or any(gone.name == name for all_gone in self.gone.values() for gone in all_gone):
            return name
        if len(sets) == 1:
            return next(iter(sets))
        raise Impossible(f"task '{self.called(j)}' has no test cases")

    def called(self, j: int) -> str:
        """What people call task j."""
        return self.stream.tasks[j].called

    def structures(self, j: int) -> frozenset[int]:
        """Classes that task j annotates."""
        return frozenset(self.stream.tasks[j].annotated)

    def of(self, t: int, j: int, classes: Iterable[int] | None = None) -> float:
        """d[t][j], over the given structures or all that task j annotates.

        Raises:
            Impossible: It cannot be computed.
        """
        if t not in self.tables:
            raise Impossible(f"the cases after task {t + 1} were not recorded")
        test, name = self.own_set(j), self.called(j)
        for gone in self.gone.get(t, ()):
            if gone.name == test:
                raise Impossible(gone.why(self.stream))
        if test not in self.tables[t].sets:
            raise Impossible(f"task '{name}' was not measured after task {t + 1}")
        return _mean_dice(self.tables[t], self.structures(j) if classes is None else classes, test, name)


def _mean_dice(table: CaseTable, classes: Iterable[int], test: str | None, task: str) -> float:
    means = [float(values.mean()) for c in sorted(classes) if len(values := table.of("dice", c, test))]
    if not means:
        raise Impossible(f"no test case of task '{task}' shows its structures")
    return sum(means) / len(means)


def average_dice(d: TaskDice, after: int) -> list[float]:
    """Terms of A-Dice, the benchmark's (1/T) sum over j of d[T][j].

    A joint run has one task: its test sets stand for the tasks of the stream, in order, with the structures that their
    ground truth shows; where there is one set, the classes of each task on it.
    """
    if not d.stream.merged:
        return [d.of(after, j) for j in range(after + 1)]
    if after not in d.tables:
        raise Impossible(f"the cases after task {after + 1} were not recorded")
    table, groups = d.tables[after], d.stream.groups
    sets = list(dict.fromkeys(table.sets))
    if len(sets) == 1:
        return [_mean_dice(table, group, None, f"{j + 1}") for j, group in enumerate(groups)]
    return [_mean_dice(table, table.structures(test), test, test) for test in sets]


def relative_backward(d: TaskDice, after: int) -> list[float]:
    """Terms of BWTR in percent: (d[T][j] - d[j][j]) / d[j][j] of earlier tasks."""
    terms = []
    for j in range(after):
        first = d.of(j, j)
        if not first:
            raise Impossible(f"task '{d.called(j)}' was at 0 right after it was learned")
        terms.append(100 * (d.of(after, j) - first) / first)
    return terms


def plasticity(d: TaskDice, alone: TaskDice | None, after: int) -> list[float]:
    """Terms of RMA in percent: d[j][j] / d of a model that learned task j alone, from the second task on."""
    if alone is None:
        raise Impossible("needs a run of the method 'independent' on the same stream: perdure compare")
    terms = []
    for j in range(1, after + 1):
        own = alone.of(j, j)
        if not own:
            raise Impossible(f"the model that learned task '{d.called(j)}' alone is at 0")
        terms.append(100 * d.of(j, j) / own)
    return terms


def forward(d: TaskDice, numbers: Mapping[int, TaskNumbers], after: int) -> list[float]:
    """Terms of E-FWT in points: d[l][j] - d of the untrained model on task j, for l < j."""
    first = d.structures(0)
    other = next((j for j in range(1, after + 1) if d.structures(j) != first), None)
    if other is not None:
        raise Impossible(f"task '{d.called(other)}' annotates other classes than the first one")
    terms = []
    for j in range(1, after + 1):
        found = numbers.get(j, TaskNumbers())
        if len(found.earlier) != j:
            raise Impossible(f"earlier models were not measured on the test cases of task '{d.called(j)}'")
        for dice in found.earlier:
            if dice is None or found.untrained is None:
                raise Impossible(f"no test case of task '{d.called(j)}' shows its structures")
            terms.append(dice - found.untrained)
    return terms


def told_by_name(stream: DescribedStream, numbers: Mapping[int, TaskNumbers], after: int) -> list[float]:
    """Terms of FWT in percent: mean IoU of each later task's classes by the model before it."""
    terms = []
    for j in range(1, after + 1):
        named = numbers.get(j, TaskNumbers()).named
        if named is None:
            raise Impossible(f"before task '{stream.tasks[j].called}' its classes were not predicted by their names")
        terms.append(named)
    return terms


def dice_of(cases: CaseCounts, classes: Iterable[int]) -> float | None:
    """Mean over structures of their mean Dice over cases, in percent; ``None`` where no case shows one."""
    means = []
    for c in sorted(classes):
        truth, guess, both = cases.pixels[:, cases.labels.index(c)].T
        shown = truth + guess > 0
        if shown.any():
            means.append(float(np.mean(200 * both[shown] / (truth + guess)[shown])))
    return round(mean(means), DIGITS) if means else None


def growth(kept: Mapping[int, KeptCounts], after: int) -> list[float]:
    """Terms of MPE in percent: (P_t - P_(t-1)) / P_1 of later tasks."""
    for t in range(after + 1):
        if t not in kept or not kept[t].parameters:
            raise Impossible(f"the ledger of task {t + 1} lists no weights")
    counts = [kept[t].parameters for t in range(after + 1)]
    return [100 * (counts[t] - counts[t - 1]) / counts[0] for t in range(1, after + 1)]


def replay(
    stream: DescribedStream, kept: Mapping[int, KeptCounts], numbers: Mapping[int, TaskNumbers], after: int
) -> list[float]:
    """Terms of DRR in percent: replayed samples / new training samples of each later task."""
    terms = []
    for t in range(1, after + 1):
        task, replayed = stream.tasks[t], numbers.get(t, TaskNumbers()).replayed
        if t - 1 not in kept:
            raise Impossible(f"task {t} has no ledger")
        if kept[t - 1].samples and not replayed:
            raise Impossible("the method keeps samples, and does not say how many it replays")
        if replayed and not task.images:
            raise Impossible(f"the number of training images of task '{task.called}' is not known")
        terms.append(100 * replayed / task.images if replayed else 0.0)
    return terms


def lost(d: TaskDice, after: int, again: bool, rule: str) -> list[float]:
    """Terms of forgetting: points of Dice lost on each earlier task.

    Args:
        d: The run.
        after: The last task.
        again: Of structures that a later task annotates again (appearance), else of the others (semantics).
        rule: See the definition of ``forgetting``.
    """
    terms = []
    for j in range(after):
        later = frozenset[int]().union(*(d.structures(k) for k in range(j + 1, after + 1)))
        classes = d.structures(j) & later if again else d.structures(j) - later
        if not classes:
            continue
        rows = [d.of(t, j, classes) for t in range(j, after + 1)]
        best = {"max-last": max(rows[:-1]), "best-last": max(rows), "first-last": rows[0]}
        terms.append(best[rule] - rows[-1])
    if not terms:
        raise Impossible(
            "no task annotates a structure of an earlier one"
            if again
            else "later tasks annotate all structures of the earlier ones"
        )
    return terms


def whole_class(table: CaseTable | None, seen: Sequence[int], after: int) -> list[float]:
    """Terms of WCD: the mean Dice over all cases of each class seen so far."""
    if table is None:
        raise Impossible(f"the cases after task {after + 1} were not recorded")
    means = [float(values.mean()) for c in seen if len(values := table.of("dice", c))]
    if not means:
        raise Impossible("no test case shows a class")
    return means


def mean(terms: Sequence[float]) -> float:
    """Mean of at least one term."""
    return float(np.mean(terms))
