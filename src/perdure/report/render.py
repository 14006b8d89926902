"""Templates and the few ways in which pages write numbers."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from perdure.metrics.definitions import figure

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup
    from PIL.Image import Image as Picture

NONE: Final = "–"
PICTURE: Final = 176
_TINY, _LARGE = 64, 96


@dataclass(frozen=True, slots=True)
class Thumb:
    """A small picture: its ``data:`` address and the size in which a page shows it, in pixels."""

    address: str
    width: int
    height: int


def environment() -> Environment:
    """Templates of this package; HTML ones escape whatever they show."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    loader = FileSystemLoader(Path(__file__).parent / "templates")

    made = Environment(
        loader=loader,
        autoescape=select_autoescape(enabled_extensions=("html.j2",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(number=number, signed=signed, size=size, anchor=anchor, cell=cell, breaks=breaks, after=after)
    return made


def number(value: float | None, digits: int = 1) -> str:
    """``12.3``, or a dash where there is no value."""
    return NONE if value is None else f"{value:.{digits}f}".replace("-0.0", "0.0" if value > -0.05 else "-0.0")


def signed(value: float | None, digits: int = 1) -> str:
    """``+1.2``, ``−3.4`` or a dash."""
    if value is None:
        return NONE
    text = f"{value:+.{digits}f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def size(count: int | None) -> str:
    """Bytes in words: ``2,060 B``, ``41.2 kB``, ``97.3 MB``."""
    if count is None:
        return NONE
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e4)):
        if count >= scale:
            return f"{count / (1e3 if unit == 'kB' else scale):.1f} {unit}"
    return f"{count:,} B"


def short(name: str) -> str:
    """A figure's name without its options."""
    return name.partition("[")[0]


def anchor(name: str) -> str:
    """Where a page explains a figure."""
    return "def-" + short(name).replace(".", "-")


def breaks(name: str) -> Markup:
    """A figure's full name that may be broken before and inside its brackets."""
    from markupsafe import Markup, escape

    return Markup(str(escape(name)).replace("[", "<wbr>[").replace(",", ",<wbr>"))  # noqa: S704


def after(task: str) -> str:
    """``after task NAME``."""
    return f"after task {task}"


def cell(text: object) -> str:
    """Text that fits into a Markdown table cell."""
    return " ".join(str(text).replace("|", "\\|").split())


def picture(path: Path, sharp: bool, side: int = PICTURE) -> str:
    """PNG as a ``data:`` address, made smaller so that its longer side is at most ``side`` pixels.

    Args:
        path: The file.
        sharp: Label maps: take the nearest pixel instead of mixing colours.
        side: Longest side in pixels.
    """
    from PIL import Image

    with Image.open(path) as opened:
        image = opened.convert("RGB")
    scale = side / max(image.size)
    if scale < 1:
        width, height = (max(1, round(s * scale)) for s in image.size)
        way = Image.Resampling.NEAREST if sharp else Image.Resampling.LANCZOS
        image = image.resize((width, height), way)
    return _address(image)


def thumbnail(image: Picture) -> Thumb:
    """A picture in about the size of a thumbnail.

    Large ones are made smaller; tiny ones are stored as they are and shown larger by a whole factor, so that a page can
    draw each of their pixels as a sharp square.
    """
    from PIL import Image

    image = image.convert("RGB")
    longest = max(image.size)
    if longest > _LARGE:
        size = (max(1, image.width * _LARGE // longest), max(1, image.height * _LARGE // longest))
        image = image.resize(size, Image.Resampling.LANCZOS)
    factor = max(1, round(_TINY / longest))
    return Thumb(_address(image), image.width * factor, image.height * factor)


def _address(image: Picture) -> str:
    """PNG as a ``data:`` address."""
    data = io.BytesIO()
    image.save(data, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode("ascii")


def definitions(names: Iterable[str]) -> list[dict[str, Any]]:
    """What a page says about each figure it shows, once for each definition, in order."""
    shown: dict[str, dict[str, Any]] = {}
    for name in names:
        fig = figure(name)
        d = fig.definition
        entry = shown.setdefault(d.name, {"name": d.name, "definition": d, "meaning": d.meaning, "variants": []})
        options = " ".join(o.meaning[fig[o.key]] for o in d.options)
        entry["variants"].append({"name": str(fig), "meaning": options})
    return list(shown.values())
