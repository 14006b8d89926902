"""Coloured tables of a report: classes after each task, which class is taken for which, bytes that are kept.

Colours are readable for colour-blind readers: viridis for values, blue and orange for better and worse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from perdure.kept.ledger import sample_pictures
from perdure.labels import BACKGROUND
from perdure.metrics.cases import MEASURES, CaseTable, Spread, spread
from perdure.metrics.measured import RunResults, Value
from perdure.report.kept_items import KeptItem
from perdure.report.render import NONE, WORDS, hex_color
from perdure.streams.description import DescribedStream, DescribedTask

_SCALE: Final = ((68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141),
                 (39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37))  # fmt: skip
_BETTER, _WORSE = "31,119,200", "222,96,10"
MOST_NUMBERS: Final = 16
"""With more classes the cells of a confusion table hold no numbers."""
MOST_SMALL: Final = 48
"""With more classes they are tiny, and only the last table is drawn."""
LEAST_SHARE: Final = 0.01
"""Of a class, that another one has to take to be named."""
MOST_TAKEN: Final = 3
"""Classes that are named for one class."""
KINDS: Final = ("weights", "statistics", "prototypes", "synthetic", "exemplars", "preview")


@dataclass(frozen=True)
class Cell:
    """One cell of a coloured table: text, CSS, a tooltip, and class names for special cells."""

    text: str
    style: str = ""
    title: str = ""
    kind: str = ""


@dataclass(frozen=True)
class HeatRow:
    """One class of a heat map; ``first`` where a task begins."""

    class_id: int
    name: str
    color: str
    taught: str
    cells: tuple[Cell, ...]
    first: bool


@dataclass(frozen=True)
class ConfusionRow:
    """Images (pixels) of one class: how many, and what they were called."""

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


@dataclass(frozen=True)
class Mistake:
    """What one class is taken for: how much of it there is, its recall in %, and names, colours and shares in %."""

    name: str
    color: str
    total: int
    recall: float
    taken: tuple[tuple[str, str, float], ...]


@dataclass(frozen=True)
class CaseStatistic:
    """A figure of one class over cases; ``sd`` and ``interval`` (95 %) are ``None`` for a single case."""

    mean: float
    sd: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class CaseRow:
    """One class over cases: its Dice, and HD95, ASD and NSD where the spacing is known in mm."""

    name: str
    color: str
    spread: Spread
    figures: tuple[CaseStatistic | None, ...]


@dataclass(frozen=True)
class LedgerTable:
    """Bytes by task and kind, and the items after the last sealed task.

    Each item comes with the number of those it stands for and, of sample pictures, words for them (else "").
    """

    kinds: list[str]
    totals: dict[int, dict[str, int]]
    rows: list[tuple[KeptItem, int, str]]


def class_colors(stream: DescribedStream) -> dict[int, str]:
    """``#rrggbb`` of each class; black for label 0."""
    return {BACKGROUND: "#000000", **{c.id: hex_color(c.color) for c in stream.classes}}


def heat(value: float) -> str:
    """CSS of a cell for a percentage: viridis background and black or white text, whichever contrasts more."""
    place = min(max(value / 100.0, 0.0), 1.0) * (len(_SCALE) - 1)
    k = min(int(place), len(_SCALE) - 2)
    share = place - k
    rgb = [round(a + (b - a) * share) for a, b in zip(_SCALE[k], _SCALE[k + 1], strict=True)]
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]  # relative luminance (WCAG 2)
    text = "#000" if luminance > 0.179 else "#fff"
    return f"background:rgb({rgb[0]},{rgb[1]},{rgb[2]});color:{text}"


def difference_cell(first: float | None, other: float | None, title: str, kind: str, none: str) -> Cell:
    """Points between two percentages: blue is better, orange is worse, no difference is the page's own colour.

    Args:
        first: The value that is compared with.
        other: The value.
        title: Tooltip; ``{other}`` and ``{points}`` stand for the numbers.
        kind: Class names of the cell.
        none: Class names where one of the values is missing.
    """
    if first is None or other is None:
        return Cell(NONE, kind=none)
    points = other - first
    strength = min(abs(points) / 40.0, 1.0) * 0.62  # 40 points have the full colour
    style = f"background:rgba({_BETTER if points > 0 else _WORSE},{strength:.3f})"
    text = f"{points:+.0f}".replace("-", "−") if abs(points) >= 0.5 else "0"
    return Cell(text, style, title.format(other=f"{other:.2f} %", points=f"{points:+.2f} points"), kind)


def heat_rows(results: RunResults) -> list[HeatRow]:
    """IoU (recall) of each class after each task, in learning order; background first where there is one.

    Unless the run is a joint one, the last cell of a row is the change since the class was learned.
    """
    stream, last = results.stream, results.last
    words, colors, names = WORDS[stream.kind], class_colors(stream), stream.names
    values = {t: results.class_values(words.by_class, t) for t in results.counts}
    firsts = {group[0] for group in stream.groups if group}
    rows = []
    for class_id in ([BACKGROUND] if stream.background is not None else []) + list(stream.order):
        group = -1 if class_id == BACKGROUND else stream.group_of(class_id)
        taught = 0 if stream.merged else max(group, 0)
        cells = []
        for t in range(len(stream.tasks)):
            if t < taught:
                cells.append(Cell("", title="not taught yet", kind="before"))
            elif t not in values:
                cells.append(Cell("", title="this task is not done yet", kind="pending"))
            else:
                value, n = found = values[t].get(class_id, Value(None, 0))
                if value is None:
                    why = found.why or f"no {words.one} of this class in the ground truth"
                    cells.append(Cell(NONE, title=why, kind="none"))
                else:
                    title = f"{words.title} {value:.2f} % over {n:,} {words.many}"
                    cells.append(Cell(f"{value:.0f}", heat(value), title, "taught" if t == taught else ""))
        if not stream.merged:
            cells.append(_since_learned(values, last, class_id, taught, stream.of_data_sets))
        when = "" if group < 0 or stream.merged else stream.tasks[taught].spoken
        rows.append(HeatRow(class_id, names[class_id], colors[class_id], when, tuple(cells), class_id in firsts))
    return rows


def _since_learned(
    values: Mapping[int, Mapping[int, Value]], last: int | None, class_id: int, taught: int, of_sets: bool
) -> Cell:
    if last is None or last <= taught or taught not in values:
        return Cell("", kind="change")
    none = Value(None, 0)
    first, now = values[taught].get(class_id, none), values[last].get(class_id, none)
    if of_sets and first.n != now.n and None not in (first.value, now.value):
        # a later set brought test cases that show it too: easier ones would look like learning, harder like forgetting
        return Cell(NONE, title="measured on other test cases then: the two values do not compare", kind="change")
    return difference_cell(first.value, now.value, "{points} since it was learned", "change", none="change")


def confusion_tables(results: RunResults) -> list[ConfusionTable]:
    """Tables of which class is taken for which, the last task first.

    Of a segmentation run only the last one, whose cells are shares of the rows; none with more classes than a reader
    can tell apart in a table: :func:`mistakes` says then what a model confuses.
    """
    stream = results.stream
    measured = sorted(results.counts, reverse=True)
    many = bool(measured) and len(stream.tasks[measured[0]].seen) > MOST_SMALL
    if stream.kind == "segmentation":
        measured = [] if many else measured[:1]
    return [_confusion_table(results, stream.tasks[t]) for t in (measured[:1] if many else measured)]


def _confusion_table(results: RunResults, task: DescribedTask) -> ConfusionTable:
    """Rows are the true classes, columns what the model said, both in learning order; background first."""
    stream, counts = results.stream, results.counts[task.index]
    order = [c for c in stream.order if c in task.seen]
    order = ([BACKGROUND] if stream.background is not None else []) + order
    starts = {group[0] for group in stream.groups[1:] if group} | ({order[1]} if order[:1] == [BACKGROUND] else set())
    edges = tuple(c in starts for c in order)
    size = "numbers" if len(order) <= MOST_NUMBERS else "small" if len(order) <= MOST_SMALL else "tiny"
    at = [counts.labels.index(c) for c in order]  # counts are in the order of ids
    names = tuple(stream.space.name(c) for c in order)
    pixels, many = stream.kind == "segmentation", WORDS[stream.kind].many
    rows = []
    for truth, row, begins in zip(names, at, edges, strict=True):
        total = int(counts.truth[row])
        cells = []
        for called, column, edge in zip(names, at, edges, strict=True):
            n, right = int(counts.matrix[row, column]), row == column
            kind = " ".join([*(["edge"] if edge else []), *(["right"] if right else [])])
            if not n:
                cells.append(Cell("0" if right and total and size == "numbers" else "", kind=kind))
                continue
            share = n / total
            style = f"background:rgba({_BETTER if right else _WORSE},{0.08 + 0.6 * share:.3f})"
            title = f"{truth} called {called}: {n:,} of {total:,} {many}, {100 * share:.1f} %"
            text = (f"{100 * share:.0f}" if right or share >= 0.005 else "") if pixels else f"{n:,}"
            cells.append(Cell(text if size == "numbers" else "", style, title, kind))
        rows.append(ConfusionRow(truth, total, begins, tuple(cells)))
    return ConfusionTable(task, size, names, edges, tuple(rows))


def mistakes(results: RunResults) -> list[Mistake]:
    """What each class of the last task is most often taken for, the classes with the least recall first."""
    stream, last = results.stream, results.last
    if last is None:
        return []
    counts, colors = results.counts[last], class_colors(stream)
    found: list[Mistake] = []
    for row, label in enumerate(counts.labels):
        total = int(counts.truth[row])
        if not total or (label == BACKGROUND and stream.background is None):
            continue
        shares = counts.matrix[row] / total
        most = [int(c) for c in np.argsort(-shares, kind="stable") if c != row and shares[c] >= LEAST_SHARE]
        taken = tuple(
            (stream.names[counts.labels[c]], colors[counts.labels[c]], 100 * float(shares[c]))
            for c in most[:MOST_TAKEN]
        )
        found.append(Mistake(stream.names[label], colors[label], total, 100 * float(shares[row]), taken))
    return sorted(found, key=lambda mistake: mistake.recall)


def case_rows(stream: DescribedStream, table: CaseTable) -> list[CaseRow]:
    """Figures over cases of each class that any case shows, background first, in learning order."""
    colors = class_colors(stream)
    order = ([BACKGROUND] if stream.background is not None else []) + list(stream.order)
    shown = [c for c in order if len(table.of("dice", c))]
    in_mm = any(len(table.of("hd95", c)) for c in shown)
    measured = MEASURES if in_mm else MEASURES[:1]
    rows = []
    for c in shown:
        figures = [case_statistic(table, measure, c) for measure in measured]
        rows.append(CaseRow(stream.names[c], colors[c], spread(table.of("dice", c)), tuple(figures)))
    return rows


def case_statistic(table: CaseTable, measure: str, class_id: int) -> CaseStatistic | None:
    """Mean, deviation and confidence interval of one class; ``None`` where no case has the figure."""
    found, at = table.statistics(measure), table.labels.index(class_id)
    if not found.n[at]:
        return None
    several = found.n[at] > 1
    interval = (float(found.low[at]), float(found.high[at])) if several else None
    return CaseStatistic(float(found.mean[at]), float(found.sd[at]) if several else None, interval)


def ledger_table(ledgers: Mapping[int, Sequence[KeptItem]]) -> LedgerTable:
    """Bytes by task and kind, and the items kept after the last sealed task (previews of one origin together)."""
    totals: dict[int, dict[str, int]] = {}
    for t, items in ledgers.items():
        totals[t] = {}
        for item in items:
            totals[t][item.kind] = totals[t].get(item.kind, 0) + item.bytes
    found = {kind for kinds in totals.values() for kind in kinds}
    rows: dict[tuple[str, str], tuple[KeptItem, list[str]]] = {}
    for item in ledgers[max(ledgers)] if ledgers else ():
        # six samples have eighteen pictures: one row for all of one origin
        key = (item.kind, item.made_from if item.kind == "preview" else item.name)
        first, names = rows.get(key, (item, []))
        if names:
            both = {"bytes": first.bytes + item.bytes, "patient_data": first.patient_data or item.patient_data}
            first = first.model_copy(update=both)
        rows[key] = (first, [*names, item.name])
    shown = [
        (item, len(names), sample_pictures(names, item.made_from) if item.kind == "preview" else "")
        for item, names in rows.values()
    ]
    return LedgerTable([k for k in KINDS if k in found] + sorted(found - set(KINDS)), totals, shown)
