"""One HTML page that puts runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from perdure.labels import BACKGROUND
from perdure.metrics.definitions import figure
from perdure.report.compare import Comparison, Group, compare_groups, group_runs
from perdure.report.kept_items import Column, PictureRow, picture_rows, what_they_are
from perdure.report.plots import Line, curves
from perdure.report.render import NONE, WORDS, definitions, render
from perdure.report.run_data import load_run
from perdure.report.samples import SampleTable, chosen_samples, sample_table
from perdure.report.tables import Cell, HeatRow, class_colors, difference_cell, heat, ledger_table


@dataclass(frozen=True)
class KeptPictures:
    """Pictures that the entries keep, a column per tensor, and one line that says what they are."""

    columns: list[Column]
    rows: list[PictureRow]
    note: str


def write_comparison(runs: Sequence[Path], page: Path, figures: Sequence[str] | None = None) -> Comparison:
    """Compare runs and write the page; see :func:`perdure.report.compare.compare` for arguments and errors."""
    groups, notes = group_runs([load_run(path) for path in runs])
    comparison = compare_groups(groups, notes, figures)
    fitting = [g for g in groups if g.after is not None]
    words = WORDS[groups[0].stream.kind]
    columns = [(g.stream, g.after or 0, g.runs[0].samples.get(g.after or 0, {})) for g in fitting]
    names = [n for n in (columns[0][2] if columns else {}) if all(n in samples for _, _, samples in columns)]
    values = {
        "words": words,
        "images": groups[0].stream.measured_images,
        "c": comparison,
        "curves": comparison_curves(groups),
        "heat": difference_rows(fitting),
        "columns": [g.label for g in fitting],
        "ledgers": [(g.label, ledger_table(g.runs[0].ledgers)) for g in groups],
        "samples": sample_table(chosen_samples(names), columns) if names else SampleTable([], [], []),
        "kept": kept_pictures(fitting),
        "figure": figure,
        "definitions": definitions([*comparison.figures, words.by_class]),
    }
    render("compare.html.j2", values, page)
    return comparison


def comparison_curves(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Title and SVG of one plot per figure with a curve for each entry: means over its runs.

    Joint runs, which have one task, are a level line; figures over tasks mean nothing for them.
    """
    stream = max((g.stream for g in groups), key=lambda s: len(s.tasks))
    if len(stream.tasks) == 1:
        return []
    drawn, words = [], WORDS[stream.kind]
    for name in words.curves:
        fig = figure(name, stream.background is not None)
        lines = []
        for k, group in enumerate(groups):
            merged, over_stream = group.stream.merged, fig.definition.scope == "stream"
            means = [
                None if merged and over_stream else group.score(fig, 0 if merged else t).mean
                for t in range(len(stream.tasks))
            ]
            lines.append(Line(group.label, means, k + 1, merged))
        unit = fig.definition.unit if fig.definition.unit == "%" else f"points of {words.quality}"
        svg = curves(f"compare-{name}", lines, [t.called for t in stream.tasks], f"{fig.definition.name} in {unit}")
        if svg:
            drawn.append((fig.title, svg))
    return drawn


def difference_rows(groups: Sequence[Group]) -> list[HeatRow]:
    """IoU (recall) of each class in the first entry and how far the others are from it, in points."""
    if not groups:
        return []
    stream = max((g.stream for g in groups), key=lambda s: len(s.tasks))
    said, colors = WORDS[stream.kind].title, class_colors(stream)
    after = max(g.after or 0 for g in groups)
    by_group = [_class_means(g) for g in groups]
    known = [c for c in stream.order if c in stream.tasks[after].seen]
    rows = []
    for c in ([BACKGROUND] if stream.background is not None else []) + known:
        first = by_group[0].get(c)
        cells = [Cell(NONE, kind="none")]
        if first is not None:
            cells = [Cell(f"{first:.0f}", heat(first), f"{said} {first:.2f} %")]
        title = f"{said} {{other}}, {{points}}"
        cells += [difference_cell(first, other.get(c), title, "delta", none="none") for other in by_group[1:]]
        taught = "" if c == BACKGROUND else stream.tasks[min(stream.group_of(c), len(stream.tasks) - 1)].spoken
        # joint runs have one task: the class is shown under the task of the stream that teaches it
        starts = any(group[:1] == (c,) for group in stream.groups)
        rows.append(HeatRow(c, stream.space.name(c), colors[c], taught, tuple(cells), starts))
    return rows


def _class_means(group: Group) -> dict[int, float]:
    """Mean IoU (recall) over an entry's runs of each class that all of them measured."""
    by_class = WORDS[group.stream.kind].by_class
    values = [r.results.class_values(by_class, group.after or 0) for r in group.runs]
    means: dict[int, float] = {}
    for c in values[0]:
        known = [v for run in values if (v := run[c].value) is not None]
        if len(known) == len(values):
            means[c] = sum(known) / len(known)
    return means


def kept_pictures(groups: Sequence[Group]) -> KeptPictures:
    """Pictures that the entries keep; of several runs, the first."""
    columns: list[Column] = []
    heads: dict[str, PictureRow] = {}
    shown = [(g.label, g.stream, g.runs[0].shown.get(g.after or 0, ())) for g in groups]
    for label, stream, items in shown:
        found, rows = picture_rows(stream, items)
        for row in rows:
            head = heads.get(row.name, replace(row, cells=()))
            absent = (((), 0),) * (len(columns) - len(head.cells))  # earlier entries have no picture of the class
            heads[row.name] = replace(head, cells=(*head.cells, *absent, *row.cells))
        columns += [Column(f"{label}: {column.title}", column.item) for column in found]
    filled = [replace(h, cells=(*h.cells, *(((), 0),) * (len(columns) - len(h.cells)))) for h in heads.values()]
    note = what_they_are(shown[0][1], [i for _, _, items in shown for i in items]) if columns else ""
    return KeptPictures(columns, filled, note)
