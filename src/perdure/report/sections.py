"""What stands in a report, as plain values that the templates lay out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from perdure.kept.ledger import Entry
from perdure.labels import BACKGROUND
from perdure.metrics.definitions import figure
from perdure.metrics.figures import Value, class_values, evaluate, forgetting_by_group, group_matrix, headline
from perdure.report.cells import Cell, HeatRow
from perdure.report.colors import difference, heat, hex_color
from perdure.report.plots import Line, curves
from perdure.report.run_data import RunData
from perdure.report.words import Words, words

KINDS: Final = ("weights", "statistics", "prototypes", "synthetic", "exemplars", "preview")


def cards(run: RunData, after: int) -> list[dict[str, Any]]:
    """Headline figures after a task, with words, unit and direction."""
    made = []
    for name in headline(run.stream):
        fig = figure(name)
        d = fig.definition
        value, n = evaluate(name, run.results, after)
        made.append({"name": name, "title": fig.title, "value": value, "n": n, "unit": d.unit, "better": d.better})
    return made


def figure_table(run: RunData) -> list[tuple[str, list[Value]]]:
    """Headline figures by task."""
    return [(n, [evaluate(n, run.results, t) for t in run.results.counts]) for n in headline(run.stream)]


def heat_rows(run: RunData) -> list[HeatRow]:
    """IoU (recall) of each class after each task, in learning order; background first where there is one."""
    stream, results, said = run.stream, run.results, words(run.stream)
    values = {t: class_values(said.by_class, counts) for t, counts in results.counts.items()}
    order = ([BACKGROUND] if stream.background is not None else []) + list(stream.order)
    colors = {c.id: hex_color(c.color) for c in stream.classes} | {BACKGROUND: hex_color((0, 0, 0))}
    firsts = {group[0] for group in stream.groups if group}
    rows = []
    for class_id in order:
        group = -1 if class_id == BACKGROUND else stream.group_of(class_id)
        taught = 0 if stream.merged else max(group, 0)
        cells = [_cell(values, t, class_id, taught, said) for t in range(len(stream.tasks))]
        if not stream.merged:
            cells.append(_change(values, results.last, class_id, taught))
        when = "" if group < 0 or stream.merged else stream.tasks[taught].name
        rows.append(HeatRow(class_id, stream.names[class_id], colors[class_id], when, tuple(cells), class_id in firsts))
    return rows


def _cell(values: Mapping[int, Mapping[int, Value]], t: int, class_id: int, taught: int, said: Words) -> Cell:
    if t < taught:
        return Cell("", title="not taught yet", kind="before")
    if t not in values:
        return Cell("", title="this task is not done yet", kind="pending")
    value, n = values[t].get(class_id, Value(None, 0))
    if value is None:
        return Cell("–", title=f"no {said.one} of this class in the ground truth", kind="none")
    title = f"{said.title} {value:.2f} % over {n:,} {said.many}"
    return Cell(f"{value:.0f}", heat(value), title, "taught" if t == taught else "")


def _change(values: Mapping[int, Mapping[int, Value]], last: int | None, class_id: int, taught: int) -> Cell:
    """Points won or lost since the class was learned."""
    if last is None or last <= taught or taught not in values:
        return Cell("", kind="change")
    first, now = values[taught].get(class_id), values[last].get(class_id)
    if first is None or now is None or first.value is None or now.value is None:
        return Cell("–", kind="change")
    points = now.value - first.value
    text = f"{points:+.0f}".replace("-", "−") if abs(points) >= 0.5 else "0"
    return Cell(text, difference(points), f"{points:+.2f} points since it was learned", "change")


def run_curves(run: RunData) -> list[dict[str, str]]:
    """Curves of how good the model is and of forgetting by group; streams of one task have none."""
    stream, said = run.stream, words(run.stream)
    if len(stream.tasks) == 1:
        return []
    names = [t.name for t in stream.tasks]
    quality = _accuracies(run) if stream.kind == "classification" else _mious(run)
    plots = (
        ("How good the model is after each task", "quality", f"{said.quality} in %", quality),
        ("What it forgot of each task's classes", "forgetting", f"points of {said.quality} lost", _losses(run)),
    )
    drawn = [{"title": title, "svg": curves(key, lines, names, label)} for title, key, label, lines in plots]
    return [plot for plot in drawn if plot["svg"]]


def _over_tasks(run: RunData, name: str) -> list[float | None]:
    return [evaluate(name, run.results, t).value for t in range(len(run.stream.tasks))]


def _mious(run: RunData) -> list[Line]:
    """Mean IoU of all classes, of the first task's and of later ones."""
    titles = ("all", "first task's classes", "later classes")
    named = zip(titles, headline(run.stream)[:3], strict=True)
    return [Line(title, _over_tasks(run, name), k, dashed=k == 0) for k, (title, name) in enumerate(named)]


def _accuracies(run: RunData) -> list[Line]:
    """Accuracy over all images, balanced, and on the images of each task's classes."""
    tasks = run.stream.tasks
    rows = group_matrix(run.results, words(run.stream).of)
    every, balanced = headline(run.stream)[:2]
    lines = [
        Line("all images", _over_tasks(run, every), 0),
        Line("balanced", _over_tasks(run, balanced), 0, dashed=True),
    ]
    return lines + [Line(tasks[j].name, [rows[t.index][j] if t.index in rows else None for t in tasks], j + 1)
                    for j in range(len(run.stream.groups))]  # fmt: skip


def _losses(run: RunData) -> list[Line]:
    """Forgetting of each task's classes and its mean."""
    tasks, said = run.stream.tasks, words(run.stream)
    rows = group_matrix(run.results, said.of)
    lost = {t: forgetting_by_group(rows, t) for t in rows}
    fading = [
        Line(tasks[j].name, [lost[t.index][j] if j < len(lost.get(t.index, [])) else None for t in tasks], j + 1)
        for j in range(len(run.stream.groups) - 1)
    ]
    return [Line("mean", _over_tasks(run, said.forgetting), 0, dashed=True), *fading]


def ledger_table(run: RunData) -> dict[str, Any]:
    """Bytes by task and kind, and the items kept after the last sealed task (previews counted together)."""
    totals = {t: ledger["total_bytes"] for t, ledger in run.ledgers.items()}
    found = {k for kinds in totals.values() for k in kinds}
    kinds = [k for k in KINDS if k in found] + sorted(found - set(KINDS))
    last = run.ledgers[max(run.ledgers)]["items"] if run.ledgers else []
    return {"kinds": kinds, "totals": totals, "items": _gathered(last)}


def _gathered(items: Sequence[Entry]) -> list[dict[str, Any]]:
    """Items with previews of one origin put together; the hash of those that lie in one file."""
    shown: list[dict[str, Any]] = []
    for item in items:
        same = [s for s in shown if s["kind"] == item["kind"] == "preview" and s["made_from"] == item["made_from"]]
        if same:
            same[0]["count"] += 1
            same[0]["bytes"] += item["bytes"]
            same[0]["patient_data"] |= item["patient_data"]
        else:
            shown.append({**item, "count": 1, "sha256": item["files"][0]["sha256"] if len(item["files"]) == 1 else ""})
    return shown
