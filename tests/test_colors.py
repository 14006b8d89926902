"""Colours of classes: far enough apart for normal and colour-blind readers."""

from __future__ import annotations

import numpy as np
import pytest

from perdure.labels import spread_colors

TO_LMS = [
    [0.41222147, 0.53633254, 0.05144599],
    [0.2119035, 0.68069955, 0.10739696],
    [0.08830246, 0.28171884, 0.6299787],
]
TO_LAB = [
    [0.21045426, 0.79361779, -0.00407205],
    [1.9779985, -2.42859221, 0.45059371],
    [0.02590404, 0.78277177, -0.80867577],
]
# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
SIGHT = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
}


def seen(colors: list[tuple[int, int, int]], sight: str) -> np.ndarray:
    """OKLab coordinates (Ottosson 2020) of sRGB colours as somebody sees them."""
    srgb = np.array(colors, float) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    linear = (linear @ np.transpose(SIGHT[sight])).clip(0, 1)
    return np.cbrt(linear @ np.transpose(TO_LMS)) @ np.transpose(TO_LAB)


def least(points: np.ndarray) -> float:
    """Smallest distance between two of the points."""
    apart = np.linalg.norm(points[:, None] - points[None], axis=2)
    return float(apart[~np.eye(len(points), dtype=bool)].min())


# a difference that is just noticed side by side is about 0.02
@pytest.mark.parametrize(("sight", "twenty", "all_150", "neighbours"), [
    ("normal", 0.12, 0.035, 0.09),
    ("protanopia", 0.07, 0.02, 0.07),
    ("deuteranopia", 0.07, 0.02, 0.06),
])  # fmt: skip
def test_colours_are_apart(sight: str, twenty: float, all_150: float, neighbours: float) -> None:
    points = seen(spread_colors(150), sight)
    assert least(np.concatenate([points[:20], seen([(0, 0, 0), (224, 224, 224)], sight)])) > twenty
    assert least(points) > all_150
    assert np.linalg.norm(np.diff(points, axis=0), axis=1).min() > neighbours


def test_lists_of_any_length_begin_alike_and_hold_no_colour_twice() -> None:
    longest = spread_colors(1000)
    assert len(set(longest)) == 1000
    assert all(spread_colors(n) == longest[:n] for n in (0, 1, 20, 156, 157, 300))
