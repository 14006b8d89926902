"""The back of an eye in green light, as a fundus camera shows it: a bright disc with a brighter cup, dark vessels."""

from __future__ import annotations

from typing import Final

import numpy as np

from perdure.data.phantoms.drawing import Scanner, Scene, smooth
from perdure.data.phantoms.slices import Slice, developed, empty

CLASSES: Final = ("optic_disc", "optic_cup")
DISC, CUP = 1, 2


def draw_fundus(rng: np.random.Generator, size: int, scanner: Scanner) -> Slice:
    """Draw an image of ``size`` × ``size`` pixels; the disc is labelled without its cup."""
    scene = empty(rng, size, 0.0, turn=12, bend=0.008)
    y, x = scene.at
    retina = rng.uniform(0.36, 0.46)
    texture = np.float32(retina) + np.float32(0.035) * smooth(rng, scene.image.shape, (9, 9))
    scene.image += texture * (1 - np.float32(rng.uniform(0.6, 1.0)) * (y * y + x * x))
    side = 1 if rng.random() < 0.5 else -1  # a right or a left eye
    disc = (rng.uniform(-0.06, 0.06), side * rng.uniform(0.10, 0.20))
    macula = (disc[0] + rng.uniform(0.0, 0.06), disc[1] - side * rng.uniform(0.38, 0.44))
    scene.image *= 1 - np.float32(0.4) * np.exp(-np.square(np.hypot(y - macula[0], x - macula[1]) / np.float32(0.08)))
    height = rng.uniform(0.125, 0.17)
    radii = (height, height * rng.uniform(0.86, 1.0))
    share = rng.uniform(0.45, 0.68)
    scene.blob(disc, (radii[0] * 1.12, radii[1] * 1.12), retina + 0.05)
    scene.blob(disc, radii, rng.uniform(0.62, 0.70), DISC)
    cup = (disc[0], disc[1] - side * 0.12 * radii[1])
    scene.blob(cup, (share * radii[0], share * radii[1]), rng.uniform(0.88, 0.98), CUP)
    _vessels(rng, scene, disc, side)
    # the camera sees a circle, which stands still while the eye turns
    rows, columns = (axis.reshape(shape) for axis, shape in zip(scene.axes, ((-1, 1), (1, -1)), strict=True))
    outside = np.float32(0.49) - np.hypot(rows, columns)
    labels = scene.label.copy()
    scene.paint(outside.astype(np.float32), 0.015)
    scene.label = np.where(outside > 0, labels, 0).astype(np.uint8)
    return developed(rng, scene, scanner, noise=0.018, bias=0.12, spacing=(0.25, 0.5))


def _vessels(rng: np.random.Generator, scene: Scene, disc: tuple[float, float], side: int) -> None:
    """Arcs above and below the macula and branches to the other side: drawn over the disc, without a label."""
    labels = scene.label.copy()
    y, x = scene.at
    for up in (-1, 1):
        for toward, rise, bow in ((-side, rng.uniform(0.24, 0.32), 2.4), (-side, rng.uniform(0.10, 0.15), 1.2),
                                  (side, rng.uniform(0.20, 0.30), 1.0)):  # fmt: skip
            along = np.clip((x - np.float32(disc[1])) * np.float32(toward) / np.float32(0.62), 0, 1)
            arc = np.float32(disc[0] + 0.01 * up) + np.float32(up * rise) * (1 - (1 - along) ** np.float32(bow + 1))
            wave = np.float32(0.012) * np.sin(along * np.float32(rng.uniform(9, 16)) + np.float32(rng.uniform(0, 6)))
            slope = np.abs(np.float32(rise * (bow + 1) / 0.62) * (1 - along) ** np.float32(bow))
            width = np.float32(rng.uniform(0.010, 0.015)) * (np.float32(1.1) - np.float32(0.6) * along)
            behind = (np.float32(disc[1]) - x) * np.float32(toward) - np.float32(0.01)
            far = np.maximum(np.abs(y - arc - wave) / np.hypot(np.float32(1), slope) - width, behind)
            scene.paint(far.astype(np.float32), scene.image * np.float32(rng.uniform(0.48, 0.68)))
    scene.label = labels
