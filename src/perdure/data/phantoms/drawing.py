"""What all phantoms are drawn with: soft-edged shapes on a bent grid, smooth fields, and the effects of a scanner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

from perdure.seeds import derive_seed

Floats = npt.NDArray[np.float32]
Box = tuple[slice, ...]
SPACING_STEP: Final = 0.25
"""Spacings are multiples of it, in mm: the float32 numbers of a NIfTI header hold them exactly."""


@dataclass(frozen=True)
class Scanner:
    """How the images of one source differ in appearance from another's, with the same anatomy.

    Args:
        contrast: Share of the full contrast: of the agent in the blood, or between tissues.
        noise: Factor on the noise.
        blur: Share of each pixel that comes from its neighbours along an axis.
        bias: Strength of a smooth field over the image: uneven coils, hardened beams.
        spacing: Factor on the spacing.
    """

    contrast: float = 1.0
    noise: float = 1.0
    blur: float = 0.1
    bias: float = 1.0
    spacing: float = 1.0


def scanner(kind: str, source: int) -> Scanner:
    """The scanner of a source; number 0 is the ordinary one, every other is worse in some way of its own."""
    if source == 0:
        return Scanner()
    rng = np.random.default_rng(derive_seed("phantoms scanner", kind, source))
    draw = rng.uniform((0.25, 1.4, 0.3, 2.0, 1.05), (0.5, 2.0, 0.6, 3.0, 1.25))
    return Scanner(*map(float, draw))


@dataclass
class Scene:
    """An image under way, with the coordinates of its pixels.

    Args:
        axes: Undisturbed coordinates along each axis, ascending.
        at: The same for every pixel of the bent anatomy, one array ``(*S)`` per axis.
        image: ``(*S)`` float32.
        label: ``(*S)`` uint8; later shapes cover earlier ones.
        edge: Width over which a shape fades out, in the unit of the coordinates: about one pixel.
        reach: How far the bent coordinates can lie from the undisturbed ones.
    """

    axes: tuple[Floats, ...]
    at: tuple[Floats, ...]
    image: Floats
    label: npt.NDArray[np.uint8]
    edge: float
    reach: float

    @property
    def whole(self) -> Box:
        """All of the image."""
        return tuple(slice(None) for _ in self.axes)

    def box(self, centre: Sequence[float], radii: Sequence[float]) -> Box:
        """The part of the image that a shape can touch: the rest of a volume need not be computed."""
        # a soft edge is drawn out along the longer axes, see `ellipsoid`
        far = [radius * (1 + self.edge / min(radii)) + self.reach for radius in radii]
        ends = zip(self.axes, centre, far, strict=True)
        return tuple(slice(*map(int, np.searchsorted(axis, (c - f, c + f)))) for axis, c, f in ends)

    def ellipsoid(self, centre: Sequence[float], radii: Sequence[float], box: Box | None = None) -> Floats:
        """About the distance to the surface of an ellipsoid, negative inside, ``(*box)``.

        It is right along the shortest axis and too small along longer ones; the exact distance has no closed form.
        """
        total = np.float32(0)
        for at, c, radius in zip(self.at, centre, radii, strict=True):
            total = total + np.square((at[box or self.whole] - np.float32(c)) * np.float32(1 / radius))
        out: Floats = (np.sqrt(total) - np.float32(1)) * np.float32(min(radii))
        return out

    def paint(self, distance: Floats, value: float | Floats, label: int = 0, box: Box | None = None) -> None:
        """Fill the part of a box where a distance is negative with a value and a label, with a soft edge.

        A pixel takes the label where the shape covers more than half of it.
        """
        here = box or self.whole
        cover = np.clip(np.float32(0.5) - distance * np.float32(1 / self.edge), 0, 1)
        self.image[here] += cover * (value - self.image[here])
        self.label[here][cover > 0.5] = label

    def blob(self, centre: Sequence[float], radii: Sequence[float], value: float, label: int = 0) -> None:
        """Paint an ellipsoid."""
        box = self.box(centre, radii)
        self.paint(self.ellipsoid(centre, radii, box), value, label, box)


def smooth(rng: np.random.Generator, shape: Sequence[int], cells: Sequence[int]) -> Floats:
    """Smooth random field ``shape`` with deviation of about 0.7: so many random numbers per axis, interpolated."""
    values: Floats = rng.standard_normal(tuple(cells), np.float32)
    for length, count in zip(shape, cells, strict=True):
        # the first axis is replaced and becomes the last one, so that after all of them the order is the old one
        values = np.tensordot(values, _between(length, count), (0, 1))
    return values


@cache
def _between(length: int, cells: int) -> Floats:
    """Interpolation matrix ``(length, cells)`` with continuous slope whose rows sum to 1."""
    far = np.abs(np.linspace(0, cells - 1, length)[:, None] - np.arange(cells))
    weights: Floats = np.where(far < 1, 1 - far**2 * (3 - 2 * far), 0).astype(np.float32)
    return weights


def blurred(image: Floats, share: float, axes: Sequence[int]) -> Floats:
    """The image with a share of each pixel taken from its two neighbours along each of some axes."""
    for axis in axes:
        padded = np.pad(image, [(int(k == axis), int(k == axis)) for k in range(image.ndim)], mode="edge")
        before, after = (np.take(padded, range(k, k + image.shape[axis]), axis) for k in (0, 2))
        image = image + np.float32(share) * ((before + after) * np.float32(0.5) - image)
    return image


def rounded(spacing: float) -> float:
    """The nearest multiple of :data:`SPACING_STEP`, at least one."""
    return max(1, round(spacing / SPACING_STEP)) * SPACING_STEP
