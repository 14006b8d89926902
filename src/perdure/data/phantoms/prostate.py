"""An axial slice of the pelvis as T2-weighted magnetic resonance shows it, with the zones of the prostate."""

from __future__ import annotations

from typing import Final

import numpy as np

from perdure.data.phantoms.drawing import Scanner, Scene, smooth
from perdure.data.phantoms.slices import Slice, developed, empty

CLASSES: Final = ("peripheral_zone", "central_zone")
PERIPHERAL, CENTRAL = 1, 2


def draw_prostate(rng: np.random.Generator, size: int, scanner: Scanner) -> Slice:
    """Draw a slice of ``size`` × ``size`` pixels with both zones."""
    scene = empty(rng, size, rng.uniform(0.55, 0.66), turn=8, bend=0.012)
    scene.image += np.float32(0.05) * smooth(rng, scene.image.shape, (10, 10))
    _surroundings(rng, scene)
    y, x = scene.at
    high, wide = rng.uniform(0.17, 0.22), rng.uniform(0.21, 0.27)
    scene.blob((0.0, 0.0), (high + 0.02, wide + 0.02), 0.14)  # the capsule is dark
    scene.blob((0.0, 0.0), (high, wide), rng.uniform(0.74, 0.86), PERIPHERAL)
    middle = (-rng.uniform(0.045, 0.065), rng.uniform(-0.01, 0.01))
    radii = (high * rng.uniform(0.66, 0.76), wide * rng.uniform(0.66, 0.76))
    # nodules of many shades, as in older patients
    shade = np.float32(rng.uniform(0.30, 0.38)) + np.float32(0.10) * smooth(rng, scene.image.shape, (14, 14))
    inside = np.maximum(scene.ellipsoid(middle, radii), scene.ellipsoid((0.0, 0.0), (high, wide)))
    scene.paint(inside, shade.astype(np.float32), CENTRAL)
    scene.paint(
        (np.hypot(y - middle[0] - np.float32(0.05), x - middle[1]) - np.float32(0.016)).astype(np.float32), 0.7, CENTRAL
    )
    return developed(rng, scene, scanner, noise=0.035, bias=0.18, spacing=(1.0, 1.75))


def _surroundings(rng: np.random.Generator, scene: Scene) -> None:
    """Muscles and bones at the sides, the symphysis in front, the rectum behind."""
    for side in (-1, 1):
        scene.blob((-0.10, side * 0.50), (0.40, 0.16), rng.uniform(0.10, 0.18))
        scene.blob((-0.06, side * 0.50), (0.24, 0.09), rng.uniform(0.42, 0.55))
        scene.blob((0.10, side * 0.34), (0.27, 0.035), rng.uniform(0.13, 0.2))
    scene.blob((-0.46, 0.0), (0.15, 0.20), rng.uniform(0.12, 0.2))
    scene.blob((-0.44, 0.0), (0.10, 0.03), 0.6)
    behind = rng.uniform(0.33, 0.37)
    radius = rng.uniform(0.09, 0.12)
    scene.blob((behind, 0.0), (radius + 0.03, radius * 1.15 + 0.03), rng.uniform(0.24, 0.34))
    scene.blob((behind, 0.0), (radius, radius * 1.15), rng.choice([0.03, 0.45, 0.8]))
