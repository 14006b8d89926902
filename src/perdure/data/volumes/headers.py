"""What a file says of its volume before a voxel is read: its size, and where it lies in the world.

Images and masks are compared by it, and voxels are turned by it: an affine is taken apart into the spacing and the
sense of each axis.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from perdure.data.case import Geometry
from perdure.data.source import size_text
from perdure.data.volumes.extra import need
from perdure.data.volumes.options import LARGEST_SPACING
from perdure.errors import DataError

SKEW: Final = 1e-3
"""Cosine between two axes that still counts as a right angle: headers written as text are rounded."""
NEAR: Final = 1e-3
"""Differences of spacing (relative) and of direction (cosine) that are taken for rounding."""
Voxels = npt.NDArray[Any]
Affine = npt.NDArray[np.float64]


class Header(NamedTuple):
    """What a file says of its volume before a voxel is read.

    Args:
        path: The file.
        size: Voxels along the axes of the file.
        channels: Length of a fourth axis, the last one; 0 where there is none.
        geometry: Where the turned volume lies.
        memory: Bytes that are needed to read it as float32.
        load: Reads the voxels, ``size`` or ``(*size, channels)``, in the order and the type of the file.
    """

    path: Path
    size: tuple[int, int, int]
    channels: int
    geometry: Geometry
    memory: int
    load: Callable[[], Voxels]

    @property
    def turned(self) -> tuple[int, ...]:
        """Voxels along the axes of the turned volume, ``(D, H, W)``."""
        return tuple(self.size[axis] for axis, _ in self.geometry.axes)

    @property
    def orientation(self) -> str:
        """Where the axes of the file run to, such as ``LPS``."""
        letters = {axis: ("SAR", "IPL")[against][k] for k, (axis, against) in enumerate(self.geometry.axes)}
        return "".join(letters[axis] for axis in range(3))


def header_of(path: Path, shape: tuple[int, ...], affine: Affine, width: int, load: Callable[[], Voxels]) -> Header:
    """Header of a file with voxels of ``width`` bytes."""
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise DataError(
            f"{path} has the shape {'×'.join(map(str, shape)) or 'of a point'}, and three axes are expected",
            "save every volume in a file of its own",
        )
    x, y, z, *channels = shape
    count = int(np.prod(shape, dtype=object))
    geometry = _geometry(path, affine)

    def voxels() -> Voxels:
        return load().reshape(shape)

    return Header(path, (x, y, z), channels[0] if channels else 0, geometry, count * (width + 4), voxels)


def _geometry(path: Path, affine: Affine) -> Geometry:
    """Geometry of a file. Raises DataError for spacings and axes that no volume has."""
    spacing = np.sqrt((affine[:3, :3] ** 2).sum(0))
    if not np.isfinite(affine).all() or spacing.min() <= 0:
        raise DataError(
            f"{path} has an affine that spans no volume: spacing {'×'.join(f'{part:.4g}' for part in spacing)} mm",
            "correct the header: three axes with a spacing above 0",
        )
    if spacing.max() > LARGEST_SPACING:  # here, where every command reads it: none takes what another one refuses
        raise DataError(
            f"{path} has voxels of {'×'.join(f'{part:.4g}' for part in spacing)} mm",
            f"correct the header: a voxel measures at most {LARGEST_SPACING:g} mm",
        )
    cosines = affine[:3, :3] / spacing
    skew = np.abs(cosines.T @ cosines - np.eye(3)).max()
    if skew > SKEW:
        raise DataError(
            f"{path} has axes that are not at right angles ({np.degrees(np.arccos(skew)):.4g} degrees), as from a "
            "tilted CT gantry",
            "resample it to a grid with right angles",
        )
    axes = _axes_along(tuple(map(float, affine[:3, :3].ravel())))
    return Geometry(tuple(float(spacing[axis]) for axis, _ in axes), "mm", tuple(map(float, affine.ravel())), axes)


@functools.lru_cache(256)
def _axes_along(directions: tuple[float, ...]) -> tuple[tuple[int, bool], ...]:
    """Axes of a geometry from the directions of an affine, as nibabel has them.

    Remembered, because it is half the time of a header, and the cases of a data set have a few directions.
    """
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(directions, (3, 3))
    # along each axis of the file: the axis of the world that it follows, 0 to 2, and 1 or -1 for the sense
    along = need("nibabel").io_orientation(affine)
    by_world = {int(world): (axis, bool(sense < 0)) for axis, (world, sense) in enumerate(along)}
    return tuple(by_world[world] for world in (2, 1, 0))


def _axes(geometry: Geometry) -> tuple[tuple[int, bool], ...]:
    return geometry.axes or ((2, False), (1, False), (0, False))


def matrix(geometry: Geometry) -> Affine:
    """The affine as ``4 × 4`` numbers. Where a case has none: its axes along the world's, spacing as it is."""
    if geometry.affine:
        return np.asarray(geometry.affine, np.float64).reshape(4, 4)
    spacing = geometry.spacing or (1.0, 1.0, 1.0)
    stored = {axis: spacing[k] for k, (axis, _) in enumerate(_axes(geometry))}
    return np.diag([*(stored[axis] for axis in range(3)), 1.0])


def place(header: Header) -> Affine:
    """Indices of the *turned* volume ``(d, h, w)`` to millimetres in RAS, ``4 × 4``: equal for equal places."""
    affine = matrix(header.geometry)
    found = np.eye(4)
    found[:3, 3] = affine[:3, 3]
    for k, (axis, against) in enumerate(_axes(header.geometry)):
        found[:3, k] = -affine[:3, axis] if against else affine[:3, axis]
        if against:
            found[:3, 3] += affine[:3, axis] * (header.size[axis] - 1)
    return found


def turn(values: Voxels, geometry: Geometry) -> Voxels:
    """Voxels in the order of the file -> ``(D, H, W)`` or ``(C, D, H, W)``, contiguous."""
    axes = _axes(geometry)
    turned = values.transpose(*([3] if values.ndim == 4 else []), *(axis for axis, _ in axes))
    reverse = tuple(turned.ndim - 3 + k for k, (_, against) in enumerate(axes) if against)
    return np.ascontiguousarray(np.flip(turned, reverse) if reverse else turned)


def turn_back(values: Voxels, geometry: Geometry) -> Voxels:
    """Voxels ``(D, H, W)`` -> in the order of the file."""
    axes = _axes(geometry)
    reverse = tuple(k for k, (_, against) in enumerate(axes) if against)
    return np.flip(values, reverse).transpose([[axis for axis, _ in axes].index(k) for k in range(3)])


def difference(image: Header, mask: Header, words: tuple[str, str] = ("image", "mask")) -> str:
    """How the place of a mask differs from that of its image, in words; empty where both are the same.

    Files of unlike orientation that show the same voxels at the same places are the same. What differs by rounding is
    too: :data:`NEAR`, and for the position a hundredth of a voxel. ``words`` are what the two are called.
    """

    def beside(first: str, second: str) -> str:
        return f"{words[0]} {first}, {words[1]} {second}"

    unlike = f"orientation: {beside(image.orientation, mask.orientation)}"
    same_orientation = image.orientation == mask.orientation
    if image.turned != mask.turned:
        if image.size == mask.size and not same_orientation:
            return unlike
        return f"size: {beside(size_text(image.turned), size_text(mask.turned))} voxels"
    ours, theirs = place(image), place(mask)
    spacings = [np.sqrt((affine[:3, :3] ** 2).sum(0)) for affine in (ours, theirs)]
    if np.abs(spacings[1] / spacings[0] - 1).max() > NEAR:
        return f"spacing: {beside(_millimetres(image), _millimetres(mask))}"
    cosines = [affine[:3, :3] / spacing for affine, spacing in zip((ours, theirs), spacings, strict=True)]
    apart = np.abs(ours[:3, 3] - theirs[:3, 3]).max()
    turned, moved = np.abs(cosines[0] - cosines[1]).max() > NEAR, apart > max(NEAR, 0.01 * spacings[0].min())
    if (turned or moved) and not same_orientation:
        return unlike
    if turned:
        angle = np.degrees(np.arccos(np.clip((cosines[0] * cosines[1]).sum(0).min(), -1, 1)))
        return f"orientation: the axes of {' and '.join(words)} are {angle:.2g} degrees apart"
    return f"position: the first voxels of {' and '.join(words)} are {apart:.4g} mm apart" if moved else ""


def _millimetres(header: Header) -> str:
    return f"{'×'.join(f'{part:.4g}' for part in reversed(header.geometry.spacing))} mm"
