"""Built-in scenes of real handwritten digits on textured background: a segmentation data set without a download.

Each scene shows a few digits of scikit-learn's collection (UCI optical recognition, 8×8, 1,797 samples), enlarged,
transformed, coloured and blended into a textured background with clutter. The collection is ordered by writer and the
splits are contiguous parts of it, so test scenes show other writers than training scenes. A scene depends only on
seed, split, number, size and digits per scene.

Coordinates of the rendering are those of the unit square, so a scene of another size is a different scene in the same
style. Low-frequency fields and enlarged digits are small arrays, interpolated by multiplication with a fixed matrix per
axis. All random draws of a scene come from one generator, in a fixed order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from perdure.data.source import SPLITS, AbsentSplitError, Image, Kind, Mask, Source, Split
from perdure.errors import DataError, UsageError
from perdure.labels import LabelSpace, label_space
from perdure.seeds import derive_seed

CLASSES: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WRITERS: Final[dict[Split, tuple[int, int]]] = {"train": (0, 1150), "val": (1150, 1437), "test": (1437, 1797)}
VERSION: Final = 1  # increase it when the same seed gives other pixels: caches depend on it
Floats = npt.NDArray[np.float32]

_CACHE_BYTES: Final = 128 << 20  # rendered scenes cached per process
_GLYPH: Final = 32  # pixels of an enlarged digit
_BODY: Final = 0.8  # share of an enlarged digit's side that is ink; the rest is an empty margin
_SPAN: Final = (0.33, 0.54)  # height of a digit's ink relative to the scene's height
_TRIES: Final = 24  # random positions per digit to choose from
_LUMA: Final = np.asarray([0.299, 0.587, 0.114], np.float32)


class Scene(NamedTuple):
    """Image ``(3, S, S)`` uint8 and mask ``(S, S)`` int16 (0 background, else digit + 1)."""

    image: npt.NDArray[np.uint8]
    mask: Mask


@dataclass(frozen=True, eq=False)
class Digits(Source):
    """Digit scenes; implements :class:`~perdure.data.source.Source`. Class ids are digit + 1.

    Args:
        counts: Scenes per split.
        size: Height and width in pixels. The height of a digit is a third to a half of it.
        per_scene: Fewest and most digits per scene, all different.
        seed: Seed of the whole data set.
    """

    counts: dict[Split, int]
    size: int = 64
    per_scene: tuple[int, int] = (2, 4)
    seed: int = 0
    name: str = field(default="digits", init=False)
    kind: Kind = field(default="segmentation", init=False)
    space: LabelSpace = field(default_factory=lambda: label_space(CLASSES), init=False)
    patients: bool = field(default=False, init=False)
    other_label: int = field(default=0, init=False)
    _painted: dict[tuple[Split, str], Scene] = field(default_factory=dict, init=False, repr=False)

    def names(self, split: Split) -> Sequence[str]:
        """Scene numbers with five digits: ``00000``, ``00001``, ..."""
        if not self.counts[split]:
            raise AbsentSplitError(
                f"split '{split}' of digits is absent: 0 scenes were asked for", f"set {split} above 0"
            )
        return tuple(f"{k:05d}" for k in range(self.counts[split]))

    def image(self, split: Split, name: str) -> Image:
        """RGB scene ``(3, size, size)`` uint8."""
        return self._scene(split, name).image

    def mask(self, split: Split, name: str) -> Mask:
        """Label map ``(size, size)`` int16: 0 background, digit + 1."""
        return self._scene(split, name).mask

    def fingerprint(self, split: Split) -> str:
        """Digest of the parameters and of the version of the rendering. No scene is rendered."""
        parts = (VERSION, split, self.counts[split], self.size, *self.per_scene, self.seed)
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def _scene(self, split: Split, name: str) -> Scene:
        scene = self._painted.get((split, name))
        if scene is None:
            if not (name.isdecimal() and int(name) < self.counts[split]):
                raise DataError(f"digits has no sample '{name}' in split '{split}'")
            seed = derive_seed("digits", self.seed, split, int(name))
            scene = paint(seed, self.size, self.per_scene, WRITERS[split])
            # all or nothing: an epoch reads scenes in random order, so no scene is a better one to drop
            if len(self._painted) * 4 * self.size**2 >= _CACHE_BYTES:
                self._painted.clear()
            self._painted[split, name] = scene
        return scene

    def __getstate__(self) -> dict[str, object]:
        """Leave the cached scenes out when the source is sent to a worker process."""
        return self.__dict__ | {"_painted": {}}


def open_digits(
    size: int = 64,
    train: int = 1200,
    val: int = 200,
    test: int = 300,
    per_scene: tuple[int, int] = (2, 4),
    seed: int = 0,
) -> Digits:
    """Open the digit scenes. Nothing is rendered or loaded before a scene is read.

    Args:
        size: Height and width in pixels.
        train: Training scenes.
        val: Validation scenes.
        test: Test scenes.
        per_scene: Fewest and most digits per scene. More than about four overlap.
        seed: Another seed gives other scenes with the same handwriting.

    Raises:
        UsageError: A number is out of range.
    """
    if not 32 <= size <= 1024:
        raise UsageError(f"digits: size is {size}", "32 to 1024 pixels")
    if not 1 <= per_scene[0] <= per_scene[1] <= len(CLASSES):
        raise UsageError(f"digits: per_scene is {list(per_scene)}", "two numbers from 1 to 10, fewest and most")
    counts = dict(zip(SPLITS, (train, val, test), strict=True))
    for split, count in counts.items():
        if not 0 <= count <= 99_999:
            raise UsageError(f"digits: {split} is {count}", "0 to 99999 scenes")
    return Digits(counts, size, per_scene, seed)


def paint(seed: int, size: int, per_scene: tuple[int, int], writers: tuple[int, int]) -> Scene:
    """Render a scene.

    Args:
        seed: Seed of the scene.
        size: S, height and width in pixels.
        per_scene: Fewest and most digits, all different.
        writers: Range of rows of the digit collection to take handwriting from.
    """
    rng = np.random.default_rng(seed)
    canvas = _ground(rng, size)
    _clutter(rng, canvas)
    mask = np.zeros((size, size), np.int16)
    count = int(rng.integers(per_scene[0], per_scene[1], endpoint=True))
    spans = rng.uniform(_SPAN[0], max(_SPAN[0], _SPAN[1] - 0.03 * count), count).astype(np.float32)
    places = _places(rng, spans)
    glyphs, labels = _glyphs()
    first, last = writers
    for digit, span, place in zip(rng.permutation(10)[:count], spans, places, strict=True):
        rows = first + np.flatnonzero(labels[first:last] == digit)
        _stamp(rng, canvas, mask, glyphs[rng.choice(rows)], int(digit) + 1, span, place)
    _light(rng, canvas)
    return Scene(np.rint(canvas * 255).astype(np.uint8), mask)


def _ground(rng: np.random.Generator, size: int) -> Floats:
    """Textured background ``(3, S, S)``: two colours mixed by noise of four scales and, in half of them, by waves."""
    field = np.zeros((size, size), np.float32)
    for cells, weight in ((3, 1.0), (6, 0.6), (12, 0.35), (24, 0.2)):
        spread = _spread(size, cells)
        field += weight * spread @ rng.standard_normal((cells, cells), np.float32) @ spread.T
    if rng.random() < 0.5:
        y, x = _grid(size)
        angle, frequency, phase = rng.uniform(0, np.pi), rng.uniform(15, 45), rng.uniform(0, 6.3)
        warp = np.float32(rng.uniform(0.2, 0.8)) * field
        along = np.float32(np.cos(angle) * frequency) * x + np.float32(np.sin(angle) * frequency) * y
        field += np.float32(rng.uniform(0.4, 1.0)) * np.sin(along + np.float32(phase) + warp)
    mix = 1 / (1 + np.exp(np.float32(-rng.uniform(0.8, 3.0)) * field))
    low, high = (_color(rng, rng.uniform(0.15, 0.85), 0.16) for _ in range(2))
    high = low + np.float32(0.5) * (high - low)  # similar colours, so that a digit is distinct from both
    canvas = low[:, None, None] + (high - low)[:, None, None] * mix
    grain = np.float32(rng.uniform(0.01, 0.05)) * rng.standard_normal((size, size), np.float32)
    out: Floats = canvas + grain
    return out


def _clutter(rng: np.random.Generator, canvas: Floats) -> None:
    """Blend 2 to 6 soft discs, rings and bars into the background as distractors."""
    size, count = canvas.shape[-1], int(rng.integers(2, 7))
    y, x = _grid(size)
    cy, cx = rng.uniform(0, 1, (2, count, 1, 1)).astype(np.float32)
    turn = rng.uniform(0, 2 * np.pi, (count, 1, 1)).astype(np.float32)
    u = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
    v = (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
    radius = rng.uniform(0.03, 0.14, (count, 1, 1)).astype(np.float32)
    width = rng.uniform(0.008, 0.02, (count, 1, 1)).astype(np.float32)
    disc = np.hypot(u, v) - radius
    bar = np.maximum(np.abs(u) - 1.6 * radius, np.abs(v) - width)
    kind = rng.integers(0, 3, (count, 1, 1))
    inside = np.where(kind == 0, disc, np.where(kind == 1, np.abs(disc) - width, bar))
    alpha = np.clip(0.5 - inside * np.float32(size), 0, 1) * rng.uniform(0.3, 0.8, (count, 1, 1)).astype(np.float32)
    for k in range(count):  # later shapes cover earlier ones
        canvas += alpha[k] * (_color(rng, rng.uniform(0.1, 0.9), 0.3)[:, None, None] - canvas)


def _places(rng: np.random.Generator, spans: Floats) -> Floats:
    """Centres ``(count, 2)`` in the unit square, chosen among random positions by distance to earlier digits."""
    centres = np.empty((len(spans), 2), np.float32)
    for k, span in enumerate(spans):
        margin = 0.46 * span
        tries = rng.uniform(margin, 1 - margin, (_TRIES, 2)).astype(np.float32)
        gaps = np.linalg.norm(tries[:, None] - centres[None, :k], axis=-1) / (span + spans[:k])
        nearest = gaps.min(1, initial=1.0)
        # the first position with enough distance, else the one with the largest distance
        free = np.flatnonzero(nearest > 0.44)
        centres[k] = tries[free[0] if len(free) else int(nearest.argmax())]
    return centres


def _stamp(
    rng: np.random.Generator, canvas: Floats, mask: Mask, glyph: Floats, label: int, span: np.float32, place: Floats
) -> None:
    """Transform, colour and blend one digit into the scene, and write its label."""
    size = canvas.shape[-1]
    half = 0.75 * float(span)  # of the square that is changed, with room for rotation
    top, left = (max(0, int((float(c) - half) * size)) for c in place)
    bottom, right = (min(size, int((float(c) + half) * size) + 1) for c in place)
    ink = _bend(rng, glyph, size, span, place, (slice(top, bottom), slice(left, right)))
    patch = canvas[:, top:bottom, left:right]
    # lighter or darker than the background by 0.3 to 0.5, as grey: a digit is then visible whatever its hue
    light, gap = float(patch.mean((1, 2)) @ _LUMA), rng.uniform(0.30, 0.50)
    up = light < 0.4 or (light < 0.6 and rng.random() < 0.5)
    color = _color(rng, light + gap if up else light - gap, 0.4)
    if rng.random() < 0.6:  # a soft shadow
        shift = max(1, size // 48)
        patch[:, shift:, shift:] *= 1 - np.float32(0.35) * ink[:-shift, :-shift]
    shade = 1 + np.float32(rng.uniform(-0.15, 0.15)) * np.linspace(-1, 1, bottom - top, dtype=np.float32)[:, None]
    patch += ink * (color[:, None, None] * shade - patch)
    mask[top:bottom, left:right][ink > 0.5] = label


def _bend(
    rng: np.random.Generator, glyph: Floats, size: int, span: np.float32, place: Floats, window: tuple[slice, slice]
) -> Floats:
    """Opacity of a rotated, sheared and stretched digit at the window's pixels; edges about a pixel wide."""
    y, x = (np.arange(w.start, w.stop, dtype=np.float32) for w in window)
    angle, shear, stretch = rng.uniform(-0.16, 0.16), rng.uniform(-0.1, 0.1), rng.uniform(0.85, 1.15)
    cos, sin = np.cos(angle), np.sin(angle)
    scale = _GLYPH * _BODY / (float(span) * size)
    dy, dx = ((y + 0.5) - place[0] * size)[:, None], ((x + 0.5) - place[1] * size)[None, :]
    v = np.float32(scale) * (np.float32(cos) * dy - np.float32(sin) * dx)
    u = np.float32(scale * stretch) * (np.float32(sin) * dy + np.float32(cos) * dx) + np.float32(shear) * v
    rows = np.clip(v + (_GLYPH - 1) / 2, 0, _GLYPH - 1.001)
    columns = np.clip(u + (_GLYPH - 1) / 2, 0, _GLYPH - 1.001)
    i, j = rows.astype(np.intp), columns.astype(np.intp)
    a, b = rows - i, columns - j
    upper = glyph[i, j] * (1 - b) + glyph[i, j + 1] * b
    lower = glyph[i + 1, j] * (1 - b) + glyph[i + 1, j + 1] * b
    level = upper * (1 - a) + lower * a
    threshold = np.float32(rng.uniform(0.36, 0.46))  # varies the stroke width
    out: Floats = np.clip((level - threshold) * np.float32(16 / scale / 3) + np.float32(0.5), 0, 1)
    return out


def _color(rng: np.random.Generator, light: float, chroma: float) -> Floats:
    """A colour of a given brightness, each channel at most about ``chroma`` away from grey."""
    hue = rng.uniform(-chroma, chroma, 3).astype(np.float32)
    out: Floats = np.clip(np.float32(light) + hue - hue @ _LUMA, 0, 1)
    return out


def _light(rng: np.random.Generator, canvas: Floats) -> None:
    """Apply a brightness gradient, contrast and sensor noise in place; values are clipped to 0..1."""
    y, x = _grid(canvas.shape[-1])
    dy, dx = rng.uniform(-0.25, 0.25, 2).astype(np.float32)
    canvas *= np.float32(rng.uniform(0.85, 1.1)) + dy * (y - np.float32(0.5)) + dx * (x - np.float32(0.5))
    canvas += np.float32(rng.uniform(0.0, 0.02)) * rng.standard_normal(canvas.shape, np.float32)
    np.clip(canvas, 0, 1, out=canvas)


@cache
def _glyphs() -> tuple[Floats, npt.NDArray[np.int64]]:
    """All digits enlarged to ``(1797, 32, 32)``, about 0..1, and their values. Loaded once per process."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    small = np.pad(images.reshape(-1, 8, 8).astype(np.float32) / 16, ((0, 0), (1, 1), (1, 1)))
    spread = _spread(_GLYPH, small.shape[-1])
    return spread @ small @ spread.T, labels.astype(np.int64)


@cache
def _spread(size: int, cells: int) -> Floats:
    """Interpolation matrix ``(size, cells)`` whose rows sum to 1 (Mitchell-Netravali cubic filter)."""
    at = (np.arange(size) + 0.5) / size * cells - 0.5
    far = np.abs(at[:, None] - np.arange(cells))
    near = (7 * far**3 - 12 * far**2) / 6 + 8 / 9
    tail = -7 / 18 * far**3 + 2 * far**2 - 10 / 3 * far + 16 / 9
    weights = np.where(far < 1, near, np.where(far < 2, tail, 0))
    matrix: Floats = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    return matrix


@cache
def _grid(size: int) -> tuple[Floats, Floats]:
    """Pixel centres of the unit square: a column of y and a row of x."""
    at = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    return at[:, None], at[None, :]
