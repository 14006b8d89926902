"""One HTML page that puts runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from perdure.files import write_text
from perdure.labels import BACKGROUND
from perdure.metrics.definitions import figure
from perdure.metrics.figures import class_values, evaluate
from perdure.report.cells import Cell, HeatRow
from perdure.report.colors import difference, heat, hex_color
from perdure.report.compare import Comparison, Group, compare_groups, group_runs, score_text
from perdure.report.kept_items import picture_rows, what_they_are
from perdure.report.plots import Line, curves
from perdure.report.render import definitions, environment
from perdure.report.run_data import load_run
from perdure.report.sample_rows import MOST_SAMPLES, rows_of
from perdure.report.sections import ledger_table
from perdure.report.words import words


def write_comparison(runs: Sequence[Path], page: Path, figures: Sequence[str] | None = None) -> Comparison:
    """Compare runs and write the page; see :func:`perdure.report.compare.compare` for arguments and errors."""
    groups, notes = group_runs([load_run(path) for path in runs])
    comparison = compare_groups(groups, notes, figures)
    text = environment().get_template("compare.html.j2").render(page_values(comparison, groups))
    write_text(page, text)
    return comparison


def page_values(comparison: Comparison, groups: Sequence[Group]) -> dict[str, Any]:
    """All that the template lays out."""
    fitting = [g for g in groups if g.after is not None]
    said = words(groups[0].runs[0].stream)
    return {
        "words": said,
        "c": comparison,
        "score_text": score_text,
        "curves": comparison_curves(groups),
        "heat": difference_rows(fitting),
        "columns": [g.label for g in fitting],
        "ledgers": [(g.label, ledger_table(g.runs[0])) for g in groups],
        "samples": sample_rows(fitting),
        "kept": kept_pictures(fitting),
        "figure": figure,
        "definitions": definitions([*comparison.figures, said.by_class]),
    }


def comparison_curves(groups: Sequence[Group]) -> list[dict[str, str]]:
    """One plot a figure with a curve for each entry: means over its runs, joint runs as a level line."""
    stream = max((g.runs[0].stream for g in groups), key=lambda s: len(s.tasks))
    if len(stream.tasks) == 1:
        return []
    drawn, said = [], words(stream)
    for name in said.curves:
        fig = figure(name, stream.background is not None)
        lines = [Line(g.label, _over_tasks(g, str(fig), len(stream.tasks)), k + 1, g.runs[0].stream.merged)
                 for k, g in enumerate(groups)]  # fmt: skip
        unit = fig.definition.unit if fig.definition.unit == "%" else f"points of {said.quality}"
        svg = curves(f"compare-{name}", lines, [t.name for t in stream.tasks], f"{fig.definition.name} in {unit}")
        if svg:
            drawn.append({"title": fig.title, "svg": svg})
    return drawn


def _over_tasks(group: Group, name: str, tasks: int) -> list[float | None]:
    if group.runs[0].stream.merged:
        level = None if figure(name).definition.scope == "stream" else _mean(group, name, 0)
        return [level] * tasks
    return [_mean(group, name, t) for t in range(tasks)]


def _mean(group: Group, name: str, after: int) -> float | None:
    values = [evaluate(name, r.results, after).value for r in group.runs]
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def difference_rows(groups: Sequence[Group]) -> list[HeatRow]:
    """IoU (recall) of each class in the first entry and how far the others are from it, in points."""
    if not groups:
        return []
    stream = max((g.runs[0].stream for g in groups), key=lambda s: len(s.tasks))
    said = words(stream).title
    after = max(g.after or 0 for g in groups)
    by_group = [_class_means(g) for g in groups]
    known = [c for c in stream.order if c in stream.tasks[after].seen]
    colors = {c.id: hex_color(c.color) for c in stream.classes} | {BACKGROUND: "#000000"}
    rows = []
    for c in ([BACKGROUND] if stream.background is not None else []) + known:
        first = by_group[0].get(c)
        cells = [
            Cell("–", kind="none") if first is None else Cell(f"{first:.0f}", heat(first), f"{said} {first:.2f} %")
        ]
        cells += [_difference_cell(first, other.get(c), said) for other in by_group[1:]]
        taught = "" if c == BACKGROUND else stream.tasks[min(stream.group_of(c), len(stream.tasks) - 1)].name
        starts = any(group[:1] == (c,) for group in stream.groups)
        rows.append(HeatRow(c, stream.names[c], colors[c], taught, tuple(cells), starts))
    return rows


def _class_means(group: Group) -> dict[int, float]:
    """Mean IoU (recall) over an entry's runs of each class that all of them measured."""
    by_class = words(group.runs[0].stream).by_class
    values = [class_values(by_class, r.results.counts[group.after or 0]) for r in group.runs]
    means: dict[int, float] = {}
    for c in values[0]:
        known = [v for run in values if (v := run[c].value) is not None]
        if len(known) == len(values):
            means[c] = sum(known) / len(known)
    return means


def _difference_cell(first: float | None, other: float | None, said: str) -> Cell:
    if first is None or other is None:
        return Cell("–", kind="none")
    points = other - first
    text = f"{points:+.0f}".replace("-", "−") if abs(points) >= 0.5 else "0"
    return Cell(text, difference(points), f"{said} {other:.2f} %, {points:+.2f} points", "delta")


def sample_rows(groups: Sequence[Group]) -> dict[str, Any]:
    """Samples that all entries have: image, ground truth, and each entry's prediction after the compared task."""
    columns = [(g.runs[0].stream, g.after or 0, g.runs[0].samples.get(g.after or 0, {})) for g in groups]
    names = [n for n in (columns[0][2] if columns else {}) if all(n in samples for _, _, samples in columns)]
    return rows_of(names[:MOST_SAMPLES], columns)


def kept_pictures(groups: Sequence[Group]) -> dict[str, Any]:
    """Pictures that the entries keep, a column a tensor; of several runs, the first."""
    columns: list[dict[str, Any]] = []
    by_class: dict[str, list[Any]] = {}
    heads: dict[str, Any] = {}
    shown = [(g.label, g.runs[0].stream, g.runs[0].shown.get(g.after or 0, ())) for g in groups]
    for label, stream, items in shown:
        found, rows = picture_rows(stream, items)
        for row in rows:
            cells = by_class.setdefault(row.name, [])
            cells += [((), 0)] * (len(columns) - len(cells)) + list(row.cells)
            heads.setdefault(row.name, row)
        columns += [{"title": f"{label}: {column.title}", "item": column.item} for column in found]
    rows = [replace(heads[n], cells=(*c, *[((), 0)] * (len(columns) - len(c)))) for n, c in by_class.items()]
    note = what_they_are(shown[0][1], [i for _, _, items in shown for i in items]) if columns else ""
    return {"columns": columns, "rows": rows, "note": note}
