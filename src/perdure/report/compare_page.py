"""One HTML page that puts runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perdure.files import write_text
from perdure.labels import BACKGROUND
from perdure.metrics.definitions import figure
from perdure.metrics.figures import class_values, evaluate
from perdure.report.colors import difference, heat
from perdure.report.compare import Comparison, Group, compare_groups, gather, score_text
from perdure.report.plots import Line, curves
from perdure.report.render import definitions, environment, picture
from perdure.report.run_data import load_run
from perdure.report.sections import MOST_SAMPLES, Cell, HeatRow, hex_color, ledger_table, legend

_CURVES = ("miou.all", "miou.old", "miou.new", "forgetting[max-last]")


def write_comparison(runs: Sequence[Path], page: Path, figures: Sequence[str] | None = None) -> Comparison:
    """Compare runs and write the page; see :func:`perdure.report.compare.compare` for arguments and errors."""
    groups, notes = gather([load_run(path) for path in runs])
    comparison = compare_groups(groups, notes, figures)
    text = environment().get_template("compare.html.j2").render(page_values(comparison, groups))
    write_text(page, text)
    return comparison


def page_values(comparison: Comparison, groups: Sequence[Group]) -> dict[str, Any]:
    """All that the template lays out."""
    fitting = [g for g in groups if g.after is not None]
    return {
        "c": comparison,
        "score_text": score_text,
        "curves": comparison_curves(groups),
        "heat": difference_rows(fitting),
        "columns": [g.label for g in fitting],
        "ledgers": [(g.label, ledger_table(g.runs[0])) for g in groups],
        "samples": sample_rows(fitting),
        "figure": figure,
        "definitions": definitions([*comparison.figures, "iou"]),
    }


def comparison_curves(groups: Sequence[Group]) -> list[dict[str, str]]:
    """One plot a figure with a curve for each entry: means over its runs, joint runs as a level line."""
    stream = max((g.runs[0].stream for g in groups), key=lambda s: len(s.tasks))
    if len(stream.tasks) == 1:
        return []
    drawn = []
    for name in _CURVES:
        fig = figure(name, stream.background is not None)
        lines = [Line(g.label, _over_tasks(g, str(fig), len(stream.tasks)), k + 1, g.runs[0].stream.merged)
                 for k, g in enumerate(groups)]  # fmt: skip
        unit = fig.definition.unit if fig.definition.unit == "%" else "points of mIoU"
        svg = curves(f"compare-{name}", lines, [t.name for t in stream.tasks], f"{fig.definition.name} in {unit}")
        if svg:
            drawn.append({"title": fig.definition.title, "svg": svg})
    return drawn


def _over_tasks(group: Group, name: str, tasks: int) -> list[float | None]:
    if group.runs[0].stream.merged:
        level = None if figure(name).definition.scope == "stream" else _mean(group, name, 0)
        return [level] * tasks
    return [_mean(group, name, t) for t in range(tasks)]


def _mean(group: Group, name: str, after: int) -> float | None:
    values = [evaluate(name, r.evidence, after).value for r in group.runs]
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def difference_rows(groups: Sequence[Group]) -> list[HeatRow]:
    """IoU of each class in the first entry and how far the others are from it, in points."""
    if not groups:
        return []
    stream = max((g.runs[0].stream for g in groups), key=lambda s: len(s.tasks))
    after = max(g.after or 0 for g in groups)
    by_group = [_class_means(g) for g in groups]
    known = [c for c in stream.order if c in stream.tasks[after].seen]
    colors = {c.id: hex_color(c.color) for c in stream.classes} | {BACKGROUND: "#000000"}
    rows = []
    for c in ([BACKGROUND] if stream.background is not None else []) + known:
        first = by_group[0].get(c)
        cells = [Cell("–", kind="none") if first is None else Cell(f"{first:.0f}", heat(first), f"IoU {first:.2f} %")]
        cells += [_difference_cell(first, other.get(c)) for other in by_group[1:]]
        taught = "" if c == BACKGROUND else stream.tasks[min(stream.group_of(c), len(stream.tasks) - 1)].name
        starts = any(group[:1] == (c,) for group in stream.groups)
        rows.append(HeatRow(c, stream.names[c], colors[c], taught, tuple(cells), starts))
    return rows


def _class_means(group: Group) -> dict[int, float]:
    """Mean IoU over an entry's runs of each class that all of them measured."""
    values = [class_values("iou", r.evidence.counts[group.after or 0]) for r in group.runs]
    means: dict[int, float] = {}
    for c in values[0]:
        known = [v for run in values if (v := run[c].value) is not None]
        if len(known) == len(values):
            means[c] = sum(known) / len(known)
    return means


def _difference_cell(first: float | None, other: float | None) -> Cell:
    if first is None or other is None:
        return Cell("–", kind="none")
    points = other - first
    text = f"{points:+.0f}".replace("-", "−") if abs(points) >= 0.5 else "0"
    return Cell(text, difference(points), f"IoU {other:.2f} %, {points:+.2f} points", "delta")


def sample_rows(groups: Sequence[Group]) -> dict[str, Any]:
    """Pictures that all entries have: image, ground truth, and each entry's prediction after the compared task."""
    pictures = [g.runs[0].samples.get(g.after or 0, {}) for g in groups]
    names = [n for n in (pictures[0] if pictures else {}) if all(n in p for p in pictures)][:MOST_SAMPLES]
    rows = []
    for name in names:
        image, truth = pictures[0][name].image, pictures[0][name].truth
        predictions = [picture(p[name].pred, sharp=True) for p in pictures]
        rows.append({"name": name, "image": picture(image, sharp=False), "truth": picture(truth, sharp=True),
                     "predictions": predictions})  # fmt: skip
    shown = [p[n] for p in pictures for n in names]
    return {"rows": rows, "legend": legend(groups[0].runs[0], shown) if rows else []}
