"""Curves as inline SVG that follows the page's colours in light and dark mode. Loads matplotlib when drawing."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERIES: Final = 8
MOST_DOTS: Final = 40
_MARKERS: Final = "os^DvPX*"
# colours that a plot has nowhere else; the page's CSS variables take their place, so plots follow light and dark mode
_INK, _GRID = "#010203", "#040506"


def _sentinel(k: int) -> str:
    """Colour that stands for series ``k`` until the page's own colour replaces it; 0 is the ink, 1.. repeat."""
    return f"#0a0b{1 + (k - 1) % (SERIES - 1) if k else 0:02x}"


@dataclass(frozen=True)
class Line:
    """One curve: a label and a value for each task, ``None`` where there is none.

    ``color`` picks one of the page's series colours (0 is ink) and a marker, which repeat at different lengths;
    ``dashed`` marks references and means.
    """

    label: str
    values: Sequence[float | None]
    color: int
    dashed: bool = False


@dataclass(frozen=True)
class Strip:
    """One row of a strip plot: a label, dots with the mark of those that stand out, and the reference's values."""

    label: str
    dots: Sequence[float]
    marked: Sequence[bool]
    reference: Sequence[float]


def curves(name: str, lines: Sequence[Line], ticks: Sequence[str], y_label: str) -> str:
    """Draw curves over tasks; the vertical axis holds 0.

    Args:
        name: Unique name on the page: keeps ids apart and the bytes the same each time.
        lines: What to draw.
        ticks: Names of the tasks.
        y_label: Words and unit of the vertical axis.

    Returns:
        An ``<svg>`` element without fixed size, or ``""`` if there is no point to draw.
    """
    if not any(v is not None for line in lines for v in line.values):
        return ""

    def fill(axes: Axes) -> None:
        for line in lines:
            points = [(x, v) for x, v in enumerate(line.values) if v is not None]
            if not points:
                continue
            xs, ys = zip(*points, strict=True)
            axes.plot(
                xs,
                ys,
                label=line.label,
                color=_sentinel(line.color),
                marker=_MARKERS[line.color % len(_MARKERS)],
                # hollow and larger: the point of a mean is seen around the only point that it is of
                markersize=9 if line.dashed else 5,
                markerfacecolor="none" if line.dashed else None,
                linewidth=1.6 if line.dashed else 2.2,
                linestyle="--" if line.dashed else "-",
                clip_on=False,
            )
        crowded = sum(len(t) + 2 for t in ticks) > 60
        axes.set_xticks(range(len(ticks)), ticks, rotation=35 if crowded else 0, ha="right" if crowded else "center")
        axes.set_xlim(-0.3, max(len(ticks) - 0.7, 0.3))
        axes.set_xlabel("after task", color=_INK)
        axes.set_ylabel(y_label, color=_INK)
        bottom, top = axes.get_ylim()
        axes.set_ylim(min(0.0, bottom), max(top, 10.0))  # flat curves near 0 would fill the height with noise
        axes.grid(axis="y", color=_GRID, linewidth=0.8)

    return _drawing(name, fill, 3.3, f"{y_label}: {', '.join(line.label for line in lines)}", min(4, len(lines)))


def strips(name: str, rows: Sequence[Strip], x_label: str) -> str:
    """Draw values of two sorts side by side for each class: a bar for the reference, dots for what is held against it.

    Args:
        name: Unique name on the page.
        rows: What to draw, from top to bottom.
        x_label: Words and unit of the horizontal axis.

    Returns:
        An ``<svg>`` element without fixed size, or ``""`` if no row has dots.
    """
    if not any(row.dots for row in rows):
        return ""

    def fill(axes: Axes) -> None:
        for y, row in enumerate(rows):
            _strip(axes, y, row)
        _bar(axes, [], [], label="training images: range, middle half")
        _dots(axes, [], [], marked=False, label="synthetic image")
        if any(any(row.marked) for row in rows):
            _dots(axes, [], [], marked=True, label="possible copy")
        axes.set_yticks(range(len(rows)), [r.label if len(r.label) < 25 else f"{r.label[:23]}…" for r in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(left=0.0)
        axes.set_xlabel(x_label, color=_INK)
        axes.grid(axis="x", color=_GRID, linewidth=0.8)

    return _drawing(name, fill, 1.1 + 0.3 * len(rows), f"{x_label}: {', '.join(r.label for r in rows)}", 3)


def _drawing(name: str, fill: Callable[[Axes], None], height: float, description: str, columns: int) -> str:
    """One set of axes with a legend above and no frame or ticks, as an inline element."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # text stays text: selectable and small; the salt makes ids the same each time and apart within a page
    settings = {"svg.fonttype": "none", "svg.hashsalt": f"perdure-{name}", "font.size": 9.5, "axes.unicode_minus": True}
    settings["text.parse_math"] = False  # a class may be called $x$
    with rc_context(settings):
        drawing = Figure(figsize=(6.0, height), layout="constrained")
        FigureCanvasSVG(drawing)  # instead of pyplot, whose open figures and back end are global
        axes = drawing.add_subplot()
        fill(axes)
        axes.tick_params(colors=_INK, length=0)
        axes.set_axisbelow(True)
        for side in axes.spines.values():
            side.set_visible(False)
        drawing.legend(loc="outside upper left", ncols=columns, frameon=False, labelcolor=_INK, fontsize=9)
        data = io.StringIO()
        # without a date equal runs give equal bytes
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        drawing.savefig(data, format="svg", transparent=True, metadata=no_metadata)
    return _inline(data.getvalue(), description)


def _strip(axes: Axes, y: int, row: Strip) -> None:
    """The reference's range, middle half and two marks as a bar; the dots, and other marks for those that stand out."""
    import numpy as np

    if row.reference:
        low, first, middle, third, high = np.quantile(row.reference, (0.0, 0.25, 0.5, 0.75, 1.0))
        _bar(axes, [low, high], [y, y], width=3)
        _bar(axes, [first, third], [y, y])
        axes.plot([low, middle], [y, y], color=_INK, marker="|", markersize=11, linestyle="")
    for marked in (False, True):
        shown = sorted(d for d, m in zip(row.dots, row.marked, strict=True) if m == marked)
        if len(shown) > MOST_DOTS:  # evenly many of them from the least to the greatest
            shown = [shown[round(k * (len(shown) - 1) / (MOST_DOTS - 1))] for k in range(MOST_DOTS)]
        _dots(axes, shown, [y] * len(shown), marked)


def _bar(axes: Axes, x: Sequence[float], y: Sequence[float], width: float = 10, label: str | None = None) -> None:
    axes.plot(x, y, color=_INK, alpha=0.3, linewidth=width, solid_capstyle="butt", label=label)


def _dots(axes: Axes, x: Sequence[float], y: Sequence[float], marked: bool, label: str | None = None) -> None:
    axes.plot(
        x,
        y,
        color=_sentinel(2 if marked else 1),
        marker="^" if marked else "o",
        markersize=7 if marked else 4,
        linestyle="",
        alpha=1.0 if marked else 0.8,
        zorder=3,
        clip_on=False,
        label=label,
    )


def _inline(svg: str, description: str) -> str:
    """Element for an HTML page: no prolog, no name spaces, no ids but those in use, colours of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S).replace("xlink:href", "href")
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    used = set(re.findall(r'(?:href="#|url\(#)([\w-]+)', svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda m: m[0] if m[1] in used else "", svg)
    svg = re.sub(r"font: ?([\d.]+)px[^;\"]*", r"font: \1px var(--font)", svg)
    svg = svg.replace(_INK, "var(--muted)").replace(_GRID, "var(--line)")
    for k in range(SERIES):
        svg = svg.replace(_sentinel(k), f"var(--s{k})")
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' (?:width|height)="[^"]*"', "", opening)
    return f'<svg role="img" aria-label="{label}" class="plot"{opening[4:]}>{rest}'.strip()
