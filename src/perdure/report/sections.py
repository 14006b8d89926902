"""What stands in a report, as plain values that the templates lay out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from PIL import Image

from perdure.labels import BACKGROUND, Color
from perdure.metrics.definitions import figure
from perdure.metrics.figures import Value, class_values, evaluate, forgetting_by_group, group_matrix, headline
from perdure.report.colors import difference, heat
from perdure.report.plots import Line, curves
from perdure.report.render import picture
from perdure.report.run_data import RunData
from perdure.report.samples import SampleFiles

KINDS: Final = ("weights", "statistics", "prototypes", "synthetic", "exemplars", "preview")
MOST_SAMPLES: Final = 6


@dataclass(frozen=True)
class Cell:
    """One cell of a heat map: text, CSS, a tooltip, and a class name for special cells."""

    text: str
    style: str = ""
    title: str = ""
    kind: str = ""


@dataclass(frozen=True)
class HeatRow:
    """One class of a heat map."""

    class_id: int
    name: str
    color: str
    taught: str
    cells: tuple[Cell, ...]
    first: bool


def hex_color(color: Color) -> str:
    """``#rrggbb``."""
    return "#{:02x}{:02x}{:02x}".format(*color)


def cards(run: RunData, after: int) -> list[dict[str, Any]]:
    """Headline figures after a task, with words, unit and direction."""
    made = []
    for name in headline(run.stream):
        d = figure(name).definition
        value, n = evaluate(name, run.evidence, after)
        made.append({"name": name, "title": d.title, "value": value, "n": n, "unit": d.unit, "better": d.better})
    return made


def figure_table(run: RunData) -> list[tuple[str, list[Value]]]:
    """Headline figures by task."""
    return [(n, [evaluate(n, run.evidence, t) for t in run.evidence.counts]) for n in headline(run.stream)]


def heat_rows(run: RunData) -> list[HeatRow]:
    """IoU of each class after each task, in learning order; background first where there is one."""
    stream, evidence = run.stream, run.evidence
    values = {t: class_values("iou", counts) for t, counts in evidence.counts.items()}
    order = ([BACKGROUND] if stream.background is not None else []) + list(stream.order)
    colors = {c.id: hex_color(c.color) for c in stream.classes} | {BACKGROUND: hex_color((0, 0, 0))}
    firsts = {group[0] for group in stream.groups if group}
    rows = []
    for class_id in order:
        group = -1 if class_id == BACKGROUND else stream.group_of(class_id)
        taught = 0 if stream.merged else max(group, 0)
        cells = [_cell(values, t, class_id, taught) for t in range(len(stream.tasks))]
        if not stream.merged:
            cells.append(_change(values, evidence.last, class_id, taught))
        when = "" if group < 0 or stream.merged else stream.tasks[taught].name
        rows.append(HeatRow(class_id, stream.names[class_id], colors[class_id], when, tuple(cells), class_id in firsts))
    return rows


def _cell(values: Mapping[int, Mapping[int, Value]], t: int, class_id: int, taught: int) -> Cell:
    if t < taught:
        return Cell("", title="not taught yet", kind="before")
    if t not in values:
        return Cell("", title="this task is not done yet", kind="pending")
    value, n = values[t].get(class_id, Value(None, 0))
    if value is None:
        return Cell("–", title="no pixel of this class in the ground truth", kind="none")
    return Cell(f"{value:.0f}", heat(value), f"IoU {value:.2f} % over {n:,} pixels", "taught" if t == taught else "")


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
    """Curves of mIoU and of forgetting by group; streams of one task have none."""
    stream, evidence = run.stream, run.evidence
    if len(stream.tasks) == 1:
        return []
    names, tasks = [t.name for t in stream.tasks], range(len(stream.tasks))
    quality = [
        Line(title, [evaluate(name, evidence, t).value for t in tasks], color, color == 0)
        for color, (title, name) in enumerate(
            zip(("all", "first task's classes", "later classes"), headline(stream)[:3], strict=True)
        )
    ]
    rows = group_matrix(evidence)
    lost = {t: forgetting_by_group(rows, t) for t in rows}
    fading = [
        Line(names[j], [lost[t][j] if t in lost and j < len(lost[t]) else None for t in tasks], j + 1)
        for j in range(len(stream.groups) - 1)
    ]
    mean = [Line("mean", [evaluate("forgetting[max-last]", evidence, t).value for t in tasks], 0, dashed=True)]
    plots = (
        ("How good the model is after each task", "quality", "mIoU in %", quality),
        ("What it forgot of each task's classes", "forgetting", "points of mIoU lost", mean + fading),
    )
    drawn = [{"title": title, "svg": curves(key, lines, names, label)} for title, key, label, lines in plots]
    return [plot for plot in drawn if plot["svg"]]


def ledger_table(run: RunData) -> dict[str, Any]:
    """Bytes by task and kind, and the items kept after the last sealed task (previews counted together)."""
    totals: dict[int, dict[str, int]] = {}
    for t, ledger in run.ledgers.items():
        totals[t] = {}
        for item in ledger["items"]:
            totals[t][item["kind"]] = totals[t].get(item["kind"], 0) + int(item["bytes"])
    found = {k for kinds in totals.values() for k in kinds}
    kinds = [k for k in KINDS if k in found] + sorted(found - set(KINDS))
    last = run.ledgers[max(run.ledgers)]["items"] if run.ledgers else []
    return {"kinds": kinds, "totals": totals, "items": _gathered(last)}


def _gathered(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Items with previews of one origin put together."""
    shown: list[dict[str, Any]] = []
    for item in items:
        same = [s for s in shown if s["kind"] == item["kind"] == "preview" and s["made_from"] == item["made_from"]]
        if same:
            same[0]["count"] += 1
            same[0]["bytes"] += item["bytes"]
            same[0]["patient_data"] |= bool(item.get("patient_data"))
        else:
            extra = {"count": 1, "patient_data": bool(item.get("patient_data")), "sha256": item.get("sha256", "")}
            shown.append({"per_class_bytes": None, **item, **extra})
    return shown


def sample_table(run: RunData) -> dict[str, Any]:
    """Pictures by sample: image, ground truth and the prediction after each task, and the colours in them."""
    tasks = [t for t in run.samples if run.samples[t]]
    if not tasks:
        return {"tasks": [], "rows": [], "legend": []}
    last = run.samples[tasks[-1]]
    rows = []
    for name in list(last)[:MOST_SAMPLES]:
        predictions = [_prediction(run.samples[t].get(name)) for t in tasks]
        files = last[name]
        image, truth = picture(files.image, sharp=False), picture(files.truth, sharp=True)
        rows.append({"name": name, "image": image, "truth": truth, "predictions": predictions})
    shown = [f for t in tasks for n, f in run.samples[t].items() if n in list(last)[:MOST_SAMPLES]]
    return {"tasks": [run.stream.tasks[t] for t in tasks], "rows": rows, "legend": legend(run, shown)}


def _prediction(files: SampleFiles | None) -> str | None:
    return None if files is None else picture(files.pred, sharp=True)


def legend(run: RunData, files: Sequence[SampleFiles]) -> list[tuple[str, str]]:
    """Name and colour of the classes that are seen in some pictures."""
    seen: set[Color] = set()
    for path in {p for f in files for p in (f.truth, f.pred)}:
        with Image.open(path) as image:
            pixels = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)
        seen |= {(int(r), int(g), int(b)) for r, g, b in pixels}
    entries = [(c.name, hex_color(c.color)) for c in run.stream.classes if c.color in seen]
    start = [(run.stream.names[BACKGROUND], "#000000")] if (0, 0, 0) in seen else []
    end = [("not labelled", "#e0e0e0")] if (224, 224, 224) in seen else []
    return start + entries + end
