"""What all pages share: templates, numbers in words, pictures, definitions, and words for each kind of labels."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from perdure.errors import DataError, plain
from perdure.files import write_text
from perdure.metrics.definitions import Definition, figure

if TYPE_CHECKING:
    from markupsafe import Markup
    from PIL.Image import Image as Picture

    from perdure.data.source import Kind
    from perdure.labels import Color

NONE: Final = "–"
_TINY, _LARGE = 64, 96  # pixels: smaller pictures are enlarged to about the first, larger ones shrunk to the second


@dataclass(frozen=True)
class Words:
    """Figures and words of pages for one kind of labels.

    Args:
        by_class: The figure of one class in heat maps.
        title: Its short name.
        of: What R[t][j] measures: option ``of`` of figures over tasks.
        quality: Short name of that figure.
        forgetting: Full name of the headline's forgetting.
        intransigence: Full name of the figure that is added beside a joint run.
        one: What is labelled.
        many: Several of them.
        curves: Figures of the comparison's plots.
    """

    by_class: str
    title: str
    of: str
    quality: str
    forgetting: str
    intransigence: str
    one: str
    many: str
    curves: tuple[str, ...]


WORDS: Final[dict[Kind, Words]] = {
    "segmentation": Words(
        by_class="iou",
        title="IoU",
        of="miou",
        quality="mIoU",
        forgetting="forgetting[max-last]",
        intransigence="intransigence",
        one="pixel",
        many="pixels",
        curves=("miou.all", "miou.old", "miou.new", "forgetting[max-last]"),
    ),
    "classification": Words(
        by_class="recall",
        title="recall",
        of="accuracy",
        quality="accuracy",
        forgetting="forgetting[max-last,of=accuracy]",
        intransigence="intransigence[of=accuracy]",
        one="image",
        many="images",
        curves=("accuracy.all", "accuracy.mean", "forgetting[max-last,of=accuracy]"),
    ),
}


@dataclass(frozen=True, slots=True)
class Thumb:
    """A picture: its ``data:`` address, the size in which a page shows it small, and its own size, in pixels."""

    address: str
    width: int
    height: int
    own_width: int
    own_height: int


@dataclass(frozen=True)
class Explanation:
    """What a page says of a definition, and of each variant that it shows: full name, meaning of its options."""

    definition: Definition
    variants: list[tuple[str, str]] = field(default_factory=list)


def render(template: str, values: Mapping[str, object], path: Path) -> Path:
    """Fill a template of this package and write the page; HTML templates escape whatever they show."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=select_autoescape(enabled_extensions=("html.j2",), default=False),
        undefined=StrictUndefined,  # a misspelt name in a template is an error and not an empty cell
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(
        number=number, size=size, anchor=anchor, cell=cell, breaks=breaks, css_name=css_name, words=words
    )
    write_text(path, templates.get_template(template).render(values))
    return path


def number(value: float | None, digits: int = 1) -> str:
    """``12.3``, or a dash where there is no value."""
    # what rounds to zero has no sign: "-0.0" points would read as a loss
    return NONE if value is None else f"{value:.{digits}f}".replace("-0.0", "0.0" if value > -0.05 else "-0.0")


def size(count: int | None) -> str:
    """Bytes in words: ``2,060 B``, ``41.2 kB``, ``97.3 MB``."""
    if count is None:
        return NONE
    # to the byte below 10 kB: what a method keeps per class is of that size, and methods differ by single bytes
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e4)):
        if count >= scale:
            return f"{count / (1e3 if unit == 'kB' else scale):.1f} {unit}"
    return f"{count:,} B"


def hex_color(color: Color) -> str:
    """``#rrggbb``."""
    return "#{:02x}{:02x}{:02x}".format(*color)


def anchor(name: str) -> str:
    """Where a page explains a figure: one place for all variants, so the options are cut off."""
    return "def-" + name.partition("[")[0].replace(".", "-")


def css_name(name: str) -> str:
    """A name as part of a CSS class: other characters than letters, digits and ``-`` become their code."""
    return "".join(c if c.isascii() and (c.isalnum() or c == "-") else f"_{ord(c):x}_" for c in name)


def breaks(name: str) -> Markup:
    """A figure's full name that may be broken before and inside its brackets."""
    from markupsafe import Markup, escape

    return Markup(str(escape(name)).replace("[", "<wbr>[").replace(",", ",<wbr>"))  # noqa: S704  # escaped before


def cell(text: object) -> str:
    """Text as Markdown that shows it as it is, in one line: no markup, no HTML, no end of a table cell."""
    shown = plain(" ".join(str(text).split())).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*|\[\]])", r"\\\1", shown)


def embed(path: Path) -> Thumb:
    """A PNG file as a ``data:`` address of exactly its bytes, with the size in which a page shows it small.

    Pictures are not packed anew, so that what a page shows can be found by its hash among the files of the run.

    Raises:
        DataError: The file is no PNG picture.
    """
    from PIL import Image

    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=("PNG",)) as opened:
            opened.load()
            width, height = opened.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is no PNG picture", "the file was changed or is damaged") from error
    factor = (
        max(1.0, round(_TINY / max(width, height))) if max(width, height) <= _LARGE else _LARGE / max(width, height)
    )
    return Thumb(_as_address(content), round(width * factor), round(height * factor), width, height)


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
    data = io.BytesIO()
    image.save(data, format="PNG", optimize=True)
    shown = image.width * factor, image.height * factor
    return Thumb(_as_address(data.getvalue()), *shown, image.width, image.height)


def _as_address(content: bytes) -> str:
    """PNG as a ``data:`` address: a page needs no file beside it."""
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")


def words(value: object) -> str:
    """A value of ``environment.json`` for readers; of first weights the source, its licence and part of its hash."""
    if not isinstance(value, dict):
        return NONE if value is None else str(value)
    licence, digest = value.get("licence"), value.get("sha256")
    said = [value.get("source"), licence and f"licence {licence}", digest and f"SHA-256 {str(digest)[:12]}…"]
    return ", ".join(str(part) for part in said if part)


def definitions(names: Iterable[str]) -> list[Explanation]:
    """What a page says about each figure it shows, once for each definition, in order."""
    shown: dict[str, Explanation] = {}
    for name in names:
        fig = figure(name)
        entry = shown.setdefault(fig.definition.name, Explanation(fig.definition))
        entry.variants.append((str(fig), " ".join(o.means(fig.choices[o.key]) for o in fig.definition.options)))
    return list(shown.values())
