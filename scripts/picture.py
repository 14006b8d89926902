"""Draw one test scene as each run sees it after each task, beside the curve of one figure.

    python scripts/picture.py docs/images/demo.png demo/finetune demo/star demo/joint --scene 00000

Everything comes from finished run folders: the pictures from ``tasks/*/samples``, the curve from ``results.csv``.
Rows are runs, columns the prediction after each task; a joint run has one model, which stands in the last column.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from perdure.errors import PerdureError, UsageError, nearest
from perdure.metrics.definitions import figure as parse_figure
from perdure.metrics.results import read_results
from perdure.report.run_data import RunData, load_run
from perdure.report.samples import Maps

CELL: Final = 1.15
"""Side of one picture in inches."""
CURVE: Final = 4.0
"""Width of the curve in inches."""
INK, GRID = "#22223b", "#d9d9e3"
COLORS: Final = {"finetune": "#c1121f", "star": "#0077b6", "joint": "#6c757d"}
OTHER_COLORS: Final = ("#2a9d8f", "#e09f3e", "#7b2cbf", "#3a5a40")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and write the picture."""
    parser = argparse.ArgumentParser(description="one test scene as each run sees it after each task")
    parser.add_argument("out", type=Path, help="PNG to write")
    parser.add_argument("runs", type=Path, nargs="+", help="finished run folders of one stream")
    parser.add_argument("--scene", help="a sample of tasks/*/samples; if not given, one that shows most tasks")
    parser.add_argument("--figure", default="miou.all", help="figure of the curve")
    given = parser.parse_args(arguments)
    try:
        draw(given.out, given.runs, given.scene, str(parse_figure(given.figure)))
    except PerdureError as error:
        print(f"error: {error.what}\n       {error.hint}", file=sys.stderr)
        return error.exit_code
    return 0


def draw(out: Path, folders: Sequence[Path], scene: str | None, figure: str) -> None:
    """Write the picture.

    Raises:
        UsageError: The runs share no scene of this name.
        PerdureError: A folder is no run, or damaged.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    runs = [load_run(folder) for folder in folders]
    columns = 2 + len(runs[0].stream.groups)
    shown = _scene(runs, scene)
    height = CELL * len(runs) + 0.9
    width = CELL * columns + CURVE
    page = Figure(figsize=(width, height), facecolor="white")
    grid = page.add_gridspec(
        len(runs), columns, left=0.075, right=1 - (CURVE - 0.2) / width, top=1 - 0.42 / height, bottom=0.45 / height,
        wspace=0.06, hspace=0.06,
    )  # fmt: skip
    for row, run in enumerate(runs):
        for column, (title, file) in enumerate(_cells(run, shown, columns)):
            axes = page.add_subplot(grid[row, column])
            _picture(axes, file)
            if row == 0:
                axes.set_title(title, fontsize=8, color=INK, pad=4)
            if column == 0:
                axes.set_ylabel(run.method.rpartition(":")[2], fontsize=10, color=_color(runs, row), fontweight="bold")
    curve = page.add_axes((1 - (CURVE - 0.75) / width, 0.5 / height, (CURVE - 1.7) / width, 1 - 0.95 / height))
    ends = {
        row: _line(curve, run, folder, figure, columns - 2, _color(runs, row))
        for row, (run, folder) in enumerate(zip(runs, folders, strict=True))
    }
    _dress(curve, figure, columns - 2)
    low, high = curve.get_ylim()
    for row, place in _apart(ends, 0.075 * (high - low)).items():
        text = f"{runs[row].method.rpartition(':')[2]} {ends[row]:.1f}"
        curve.text(columns - 1.9, place, text, va="center", fontsize=8, color=_color(runs, row), fontweight="bold")
    _legend(page, runs[0])
    out.parent.mkdir(parents=True, exist_ok=True)
    page.savefig(out, dpi=160, metadata={"Software": None})


def _scene(runs: Sequence[RunData], wanted: str | None) -> str:
    """Name of a sample that all runs show after all their tasks."""
    shared = sorted(set.intersection(*(set(_maps(run, t)) for run in runs for t in run.samples)))
    if not shared:
        raise UsageError("the runs share no sample pictures", "run them with report.samples above 0")
    if wanted is not None and wanted not in shared:
        raise UsageError(f"there is no scene '{wanted}' in all runs", nearest(wanted, shared))
    return wanted or max(shared, key=lambda name: _tasks_shown(runs[0], _maps(runs[0], 0)[name].truth))


def _maps(run: RunData, task: int) -> dict[str, Maps]:
    """Label maps of samples after a task; images with one class make no row of this picture."""
    return {name: sample.maps for name, sample in run.samples[task].items() if sample.maps is not None}


def _tasks_shown(run: RunData, truth: Path) -> int:
    """Number of tasks whose classes the ground truth of a scene shows: it says nothing about how good a run is."""
    with Image.open(truth) as opened:
        colors = {tuple(c) for c in np.unique(np.asarray(opened.convert("RGB")).reshape(-1, 3), axis=0).tolist()}
    return len(
        {run.stream.group_of(c.id) for c in run.stream.classes if c.color in colors and c.id in run.stream.order}
    )


def _cells(run: RunData, scene: str, columns: int) -> list[tuple[str, Path | None]]:
    """Column titles and files: photograph, ground truth, prediction after each task."""
    after = [_maps(run, t)[scene] for t in sorted(run.samples)]
    image = run.samples[max(run.samples)][scene].image
    absent: list[Path | None] = [None] * (columns - 2 - len(after))
    predictions = [*absent, *(maps.prediction for maps in after)]
    taught = [[run.stream.names[c] for c in group] for group in run.stream.groups]
    words = [", ".join(names) if len(names) < 3 else f"{names[0]} … {names[-1]}" for names in taught]
    titles = [f"after task {t + 1}\n{'+ ' if t else ''}{text}" for t, text in enumerate(words)]
    return [("scene\n", image), ("truth\n", after[-1].truth), *zip(titles, predictions, strict=True)]


def _picture(axes: Any, file: Path | None) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    if file is None:
        axes.set_facecolor("none")
        return
    with Image.open(file) as opened:
        axes.imshow(opened.convert("RGB"), interpolation="nearest", aspect="equal")


def _line(axes: Any, run: RunData, folder: Path, figure: str, tasks: int, color: str) -> float:
    """Draw the figure after each task; a run of one task among longer ones as a level. Returns the last value."""
    rows = [r for r in read_results(folder / "results.csv") if r.figure == figure and r.class_id is None]
    values = [r.value for r in rows]
    if not values:
        raise UsageError(f"{folder} has no figure {figure}", "see the column `figure` of its results.csv")
    if len(run.stream.tasks) == 1 < tasks:
        axes.plot([1, tasks], [values[0]] * 2, "--", color=color, linewidth=1.4)
    else:
        axes.plot([r.after_task + 1 for r in rows], values, "o-", color=color, linewidth=2, markersize=4)
    return values[-1]


def _apart(ends: Mapping[int, float], least: float) -> dict[int, float]:
    """Heights for the labels of the lines: as near to the last values as ``least`` between them allows."""
    places: dict[int, float] = {}
    floor = float("-inf")
    for row in sorted(ends, key=lambda r: ends[r]):
        places[row] = floor = max(ends[row], floor + least)
    return places


def _dress(axes: Any, figure: str, tasks: int) -> None:
    axes.set_title(f"{figure}, %", fontsize=8, color=INK, pad=4)
    axes.set_xlabel("tasks learned", fontsize=8, color=INK)
    axes.set_xticks(range(1, tasks + 1))
    axes.set_ylim(bottom=0)
    axes.margins(y=0.12)
    axes.tick_params(labelsize=7, colors=INK, length=0)
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def _legend(page: Any, run: RunData) -> None:
    """Colours of the classes, task by task, along the lower edge."""
    from matplotlib.patches import Patch

    by_id = {c.id: c for c in run.stream.classes}
    patches = [Patch(color=[v / 255 for v in by_id[k].color], label=by_id[k].name) for k in run.stream.order]
    page.legend(
        handles=patches, loc="lower left", bbox_to_anchor=(0.07, 0.0), ncols=min(11, len(patches)), fontsize=7,
        frameon=False, handlelength=0.9, handleheight=0.9, columnspacing=1.0, handletextpad=0.4,
    )  # fmt: skip


def _color(runs: Sequence[RunData], row: int) -> str:
    """Colour of a run: fixed for the usual three, in turn for others."""
    others = [k for k, run in enumerate(runs) if run.method not in COLORS]
    known = COLORS.get(runs[row].method)
    return known if known is not None else OTHER_COLORS[others.index(row) % len(OTHER_COLORS)]


if __name__ == "__main__":
    sys.exit(main())
