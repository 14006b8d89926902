"""What a task changed of what a model knew before it: on earlier test cases, and in its outputs on the new ones.

``changes.json`` of a task holds two matrices of counts, taken on the test cases of the task's own data set:
``outputs`` (rows: what the model said before the task, columns: what it says after it) and ``before`` (rows: ground
truth, columns: the model before the task), which tells how good it was on the new data as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np

from perdure.kept.ledger import task_folder
from perdure.kept.manifest import CHANGES, COUNTS
from perdure.labels import BACKGROUND
from perdure.metrics.confusion import ConfusionMatrix, pooled, read_counts
from perdure.metrics.measured import class_values
from perdure.streams.description import DescribedStream

OUTPUTS: Final = "outputs"
BEFORE: Final = "before"


@dataclass(frozen=True)
class ClassChange:
    """What a task did to one earlier class; Dice in percent, ``None`` where it does not exist.

    Args:
        class_id: The class.
        before: On the test cases of earlier tasks that are at hand: when they were measured last before the task.
        after: The same after it.
        as_it_was: On the new test cases: the model before the task, where they are labelled with the class. Voxels that
            are labelled with a class of the task count neither here nor in the next: the model before it knew none.
        as_it_is: The same after it, on the same voxels.
        agreement: On the new test cases: Dice of the output before the task against that after it.
        since: Names of the tasks after which cases of ``before`` were measured last, other than the task right before
            this one: what was lost in between counts too.
    """

    class_id: int
    before: float | None
    after: float | None
    as_it_was: float | None
    as_it_is: float | None
    agreement: float | None
    since: tuple[str, ...] = ()

    @property
    def fall(self) -> float | None:
        """Points lost: of Dice on earlier test cases, else on the new ones, else of agreement with the old output.

        A changed output alone may be a better one, so that it counts only where nothing is labelled.
        """
        for before, after in ((self.before, self.after), (self.as_it_was, self.as_it_is)):
            if before is not None and after is not None:
                return before - after
        return None if self.agreement is None else 100 - self.agreement

    @property
    def fell_in(self) -> str:
        """What :attr:`fall` was seen in, in words."""
        if None not in (self.before, self.after):
            return f"Dice since {', '.join(self.since)}" if self.since else "Dice"
        return "agreement with its old output" if None in (self.as_it_was, self.as_it_is) else "Dice"


@dataclass(frozen=True)
class Changes:
    """What a task changed.

    Args:
        classes: The earlier classes, in learning order.
        changed: Share of the new test cases' voxels whose label changed between two earlier labels (background
            included), in percent; those that became a new class are what the task taught. ``None`` without any.
    """

    classes: tuple[ClassChange, ...]
    changed: float | None


def read_changes(run: Path, stream: DescribedStream, task: int) -> Changes | None:
    """What a sealed task changed; ``None`` for a first task, and where it was not measured.

    Raises:
        DataError: A file is damaged.
    """
    folders = [task_folder(run, t.index, t.name) for t in stream.tasks[: task + 1]]
    if task == 0 or not (folders[task] / CHANGES).is_file():
        return None
    counted, after = read_counts(folders[task] / CHANGES), read_counts(folders[task] / COUNTS)
    before: dict[str, ConfusionMatrix] = {}
    since: dict[str, str] = {}
    for index in reversed(range(task)):  # a set that was not at hand for some tasks was measured last before them
        for name, counts in read_counts(folders[index] / COUNTS).items():
            if name not in before and name in after and _same_cases(counts, after[name]):
                before[name] = counts
                since |= {name: stream.tasks[index].name} if index < task - 1 else {}
    known = stream.tasks[task]
    return changes(known.old, counted[OUTPUTS], counted[BEFORE], before, after, known.name, since)


def _same_cases(earlier: ConfusionMatrix, later: ConfusionMatrix) -> bool:
    """Whether two counts are of as many cases, with as many voxels of each class that was known at the first one."""
    ours, theirs = (dict(zip(c.labels, map(int, c.truth), strict=True)) for c in (earlier, later))
    # background is left out: with more classes known, other voxels of it are dropped (see confusion)
    return earlier.cases == later.cases and all(theirs.get(c) == n for c, n in ours.items() if c != BACKGROUND)


def changes(
    old: Sequence[int],
    outputs: ConfusionMatrix,
    as_it_was: ConfusionMatrix,
    before: Mapping[str, ConfusionMatrix],
    after: Mapping[str, ConfusionMatrix],
    own: str = "",
    since: Mapping[str, str] = MappingProxyType({}),
) -> Changes:
    """What a task changed, from counts.

    Args:
        old: Ids of the earlier classes.
        outputs: Old output against new output on the new test cases.
        as_it_was: Ground truth against old output on the new test cases.
        before: Counts of earlier test sets before the task, as they were measured last.
        after: The same after it; only sets that are in both are compared.
        own: Name of the new test set.
        since: Earlier test set -> name of the task that it was measured after, where others came in between.
    """
    shared = [name for name in before if name in after]
    dice = [
        {c: v.value for c, v in class_values("dice", pooled({n: sets[n] for n in shared})).items()} if shared else {}
        for sets in (before, after)
    ]
    agreement, was = (class_values("dice", matrix) for matrix in (outputs, as_it_was))
    now = class_values("dice", _of_known(after[own], old)) if own in after else {}
    back = {name: matrix for name, matrix in after.items() if name != own and name not in before}
    again = class_values("dice", pooled(back)) if back else {}

    def shows(counts: ConfusionMatrix, c: int) -> bool:
        return c in counts.labels and bool(counts.truth[counts.labels.index(c)])

    found = tuple(
        ClassChange(
            c,
            dice[0].get(c),
            dice[1].get(c) if dice[0].get(c) is not None or c not in again else again[c].value,
            was[c].value if shows(as_it_was, c) else None,
            now[c].value if shows(as_it_was, c) and c in now else None,
            agreement[c].value,
            tuple(dict.fromkeys(since[name] for name in shared if name in since and shows(before[name], c))),
        )
        for c in old
    )
    known = [outputs.labels.index(c) for c in (0, *old)]
    inner = outputs.matrix[known][:, known]
    whole = int(outputs.matrix.sum())
    return Changes(found, 100 * float(inner.sum() - inner.trace()) / whole if whole else None)


def _of_known(counts: ConfusionMatrix, old: Sequence[int]) -> ConfusionMatrix:
    """Counts of the voxels that are labelled as background or with an earlier class; whatever was predicted there."""
    known = np.isin(counts.labels, (BACKGROUND, *old))
    return ConfusionMatrix(counts.labels, counts.matrix * known[:, None], counts.elsewhere * known)
