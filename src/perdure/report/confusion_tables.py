"""Which class is taken for which: the counts after each task as coloured tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from perdure.metrics.confusion import ConfusionMatrix
from perdure.report.cells import Cell
from perdure.report.colors import share
from perdure.report.run_data import RunData
from perdure.streams.description import DescribedStream, DescribedTask

MOST_NUMBERS: Final = 16
"""With more classes the cells hold no numbers."""
MOST_SMALL: Final = 48
"""With more classes the cells are tiny, and only the last table is drawn."""


@dataclass(frozen=True)
class ConfusionRow:
    """Images of one class: how many, and what they were called."""

    name: str
    total: int
    edge: bool
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class ConfusionTable:
    """Confusion matrix after one task. ``size`` is ``numbers``, ``small`` or ``tiny``.

    ``edges`` says where tasks begin.
    """

    task: DescribedTask
    size: str
    names: tuple[str, ...]
    edges: tuple[bool, ...]
    rows: tuple[ConfusionRow, ...]


def confusion_tables(run: RunData) -> list[ConfusionTable]:
    """Tables of a classification run, the last task first."""
    stream = run.stream
    if stream.kind != "classification":
        return []
    measured = sorted(run.results.counts, reverse=True)
    if measured and len(stream.tasks[measured[0]].seen) > MOST_SMALL:
        measured = measured[:1]
    return [_table(stream, stream.tasks[t], run.results.counts[t]) for t in measured]


def _table(stream: DescribedStream, task: DescribedTask, counts: ConfusionMatrix) -> ConfusionTable:
    """Rows are the true classes, columns what the model said, both in learning order."""
    order = [c for c in stream.order if c in task.seen]
    starts = {group[0] for group in stream.groups[1:] if group}
    edges = tuple(c in starts for c in order)
    size = "numbers" if len(order) <= MOST_NUMBERS else "small" if len(order) <= MOST_SMALL else "tiny"
    at = [counts.labels.index(c) for c in order]
    names = tuple(stream.names[c] for c in order)
    rows = []
    for k, row in enumerate(at):
        total = int(counts.truth[row])
        pairs = zip(at, names, edges, strict=True)
        found = [(int(counts.matrix[row, j]), j == row, name, edge) for j, name, edge in pairs]
        cells = tuple(_cell(names[k], total, *pair, size) for pair in found)
        rows.append(ConfusionRow(names[k], total, edges[k], cells))
    return ConfusionTable(task, size, names, edges, tuple(rows))


def _cell(truth: str, total: int, n: int, right: bool, called: str, edge: bool, size: str) -> Cell:
    kind = " ".join([*(["edge"] if edge else []), *(["right"] if right else [])])
    if not n:
        return Cell("0" if right and total and size == "numbers" else "", kind=kind)
    text = f"{n:,}" if size == "numbers" else ""
    title = f"{truth} called {called}: {n:,} of {total:,} images, {100 * n / total:.1f} %"
    return Cell(text, share(n / total, right), title, kind)
