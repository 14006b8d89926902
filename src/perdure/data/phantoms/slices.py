"""What the phantoms with two dimensions have in common: the grid, and the path from brightness to 8-bit pixels.

Coordinates are shares of the side of the image, y down and x to the right, with the middle at zero. Brightness runs
from 0 to 1 until a slice is developed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from perdure.data.phantoms.drawing import Scanner, Scene, blurred, rounded, smooth


class Slice(NamedTuple):
    """An image.

    Args:
        image: ``(H, W)`` uint8.
        label: ``(H, W)`` uint8, place in the classes of its kind + 1, 0 background.
        spacing: (H, W) in mm.
    """

    image: npt.NDArray[np.uint8]
    label: npt.NDArray[np.uint8]
    spacing: tuple[float, float]


def empty(rng: np.random.Generator, size: int, ground: float, turn: float, bend: float) -> Scene:
    """A scene of one brightness with its middle shifted, turned by at most ``turn`` degrees, and bent."""
    axis = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size) - np.float32(0.5)
    y, x = np.meshgrid(
        axis + np.float32(rng.uniform(-0.05, 0.05)), axis + np.float32(rng.uniform(-0.05, 0.05)), indexing="ij"
    )
    angle = np.radians(rng.uniform(-turn, turn))
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    at = (
        cos * y - sin * x + np.float32(bend) * smooth(rng, (size, size), (5, 5)),
        sin * y + cos * x + np.float32(bend) * smooth(rng, (size, size), (5, 5)),
    )
    image, label = np.full((size, size), ground, np.float32), np.zeros((size, size), np.uint8)
    # shapes are computed on the whole image: it is small, and a turn by any angle leaves no bound on where they lie
    return Scene((axis, axis), at, image, label, edge=1.2 / size, reach=1.0)


def developed(
    rng: np.random.Generator, scene: Scene, scanner: Scanner, noise: float, bias: float, spacing: tuple[float, float]
) -> Slice:
    """The image as a scanner stores it.

    Args:
        rng: Of the image.
        scene: What was drawn.
        scanner: Of the source.
        noise: Deviation of the noise.
        bias: Strength of the smooth field, as a share of the brightness.
        spacing: Smallest and largest spacing of an image of 64 pixels, in mm.
    """
    size = len(scene.image)
    image = blurred(scene.image, scanner.blur, (0, 1))
    image = image * (1 + np.float32(bias * scanner.bias) * smooth(rng, image.shape, (3, 3)))
    contrast = rng.uniform(0.85, 1.1) * (0.45 + 0.55 * scanner.contrast)
    # a scanner with less contrast is also brighter, so that its images differ at first sight
    image = np.float32(0.35 + 0.2 * (1 - scanner.contrast)) + np.float32(contrast) * (image - np.float32(0.35))
    image += np.float32(noise * scanner.noise) * rng.standard_normal(image.shape, np.float32)
    step = rounded(rng.uniform(*spacing) * scanner.spacing * 64 / size)
    return Slice(np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8), scene.label, (step, step))
