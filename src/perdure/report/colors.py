"""Colours of table cells: readable numbers on a scale that colour-blind readers can order."""

from __future__ import annotations

from typing import Final

from perdure.labels import Color

_SCALE: Final = ((68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141),
                 (39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37))  # fmt: skip
_BETTER, _WORSE = "31,119,200", "222,96,10"


def hex_color(color: Color) -> str:
    """``#rrggbb``."""
    return "#{:02x}{:02x}{:02x}".format(*color)


def heat(value: float, low: float = 0.0, high: float = 100.0) -> str:
    """CSS of a cell: background on the viridis scale and black or white text, whichever contrasts more."""
    place = min(max((value - low) / (high - low), 0.0), 1.0) * (len(_SCALE) - 1)
    k = min(int(place), len(_SCALE) - 2)
    share = place - k
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(_SCALE[k], _SCALE[k + 1], strict=True))
    text = "#000" if _luminance(red, green, blue) > 0.179 else "#fff"
    return f"background:rgb({red},{green},{blue});color:{text}"


def difference(points: float, full: float = 40.0) -> str:
    """CSS of a cell that shows a difference: blue is better, orange is worse, none is the page's own colour."""
    strength = min(abs(points) / full, 1.0) * 0.62
    return f"background:rgba({_BETTER if points > 0 else _WORSE},{strength:.3f})"


def share(part: float, right: bool) -> str:
    """CSS of a cell that shows a share of 0 to 1 of a row: blue for what is right, orange for what is wrong."""
    return f"background:rgba({_BETTER if right else _WORSE},{0.08 + 0.6 * min(max(part, 0.0), 1.0):.3f})"


def _luminance(*rgb: int) -> float:
    """Relative luminance (WCAG 2)."""
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
