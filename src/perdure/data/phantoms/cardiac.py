"""A short-axis slice of the heart as cine magnetic resonance shows it: bright blood, a dark ring of muscle."""

from __future__ import annotations

from typing import Final

import numpy as np

from perdure.data.phantoms.drawing import Scanner, Scene
from perdure.data.phantoms.slices import Slice, developed, empty

CLASSES: Final = ("left_ventricle", "myocardium", "right_ventricle")
LEFT, MUSCLE, RIGHT = 1, 2, 3


def draw_cardiac(rng: np.random.Generator, size: int, scanner: Scanner) -> Slice:
    """Draw a slice of ``size`` × ``size`` pixels with all three classes."""
    scene = empty(rng, size, 0.30, turn=35, bend=0.012)
    _surroundings(rng, scene)
    blood, muscle = rng.uniform(0.72, 0.85), rng.uniform(0.24, 0.32)
    pool, wall = rng.uniform(0.10, 0.15), rng.uniform(0.06, 0.085)
    squeeze = rng.uniform(0.9, 1.1)
    inner, outer = (pool, pool * squeeze), (pool + wall, (pool + wall) * squeeze)
    middle = (0.0, 0.07)
    # the right ventricle lies against the septum as a crescent: a larger disc, of which the muscle covers a part
    away = rng.uniform(0.09, 0.12)
    right = (middle[0] - 0.02, middle[1] - pool - away)
    radii = (rng.uniform(0.17, 0.21), rng.uniform(0.15, 0.18))
    scene.blob(right, (radii[0] + 0.018, radii[1] + 0.018), muscle + 0.06)
    scene.blob(right, radii, 0.95 * blood, RIGHT)
    scene.blob(middle, outer, muscle, MUSCLE)
    scene.blob(middle, inner, blood, LEFT)
    for angle in (rng.uniform(0.3, 1.2), rng.uniform(2.2, 3.2)):  # papillary muscles belong to the pool, by custom
        place = (middle[0] + 0.66 * pool * np.sin(angle), middle[1] + 0.66 * pool * np.cos(angle))
        thick = rng.uniform(0.016, 0.026)
        scene.blob(place, (thick, thick), muscle, LEFT)
    return developed(rng, scene, scanner, noise=0.03, bias=0.22, spacing=(1.5, 2.5))


def _surroundings(rng: np.random.Generator, scene: Scene) -> None:
    """Wall of the chest, lung, liver, fat around the heart."""
    y, x = scene.at
    wall = rng.uniform(0.32, 0.38)
    scene.blob((0.08, 0.42), (0.48, rng.uniform(0.26, 0.32)), rng.uniform(0.04, 0.10))
    scene.blob((-0.30, -0.42), (0.26, 0.30), rng.uniform(0.05, 0.12))
    scene.blob((0.52, -0.22), (rng.uniform(0.24, 0.30), 0.44), rng.uniform(0.38, 0.48))
    scene.blob((0.30, 0.36), (0.07, 0.07), rng.uniform(0.6, 0.75))  # the aorta, as bright as the chambers
    front = (-np.float32(wall) - y + np.float32(0.25) * x * x).astype(np.float32)
    scene.paint(-front - np.float32(0.06), rng.uniform(0.3, 0.4))
    scene.paint(-front, rng.uniform(0.75, 0.95))
    scene.paint(np.float32(0.10) - front, 0.02)
    scene.blob((0.0, 0.0), (rng.uniform(0.30, 0.34), rng.uniform(0.38, 0.43)), rng.uniform(0.5, 0.62))
