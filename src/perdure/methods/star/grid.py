"""Full-resolution maps seen on the feature grid, without ever making the full-resolution map of the old network.

A grid cell covers ``stride`` pixels along each axis. ``G(x)`` of the paper takes the pixel ``stride // 2`` of
each cell. A linear resize (corners not aligned) of a map to the grid averages the pixels next to the cell's
centre: two an axis for an even stride, one for an odd one. These *core* pixels are all that STAR's masks need, so
pseudo-labels are computed there only: 4 of 256 pixels at stride 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from perdure.errors import PerdureError


def check_size(size: Sequence[int], stride: int) -> None:
    """Raise :class:`PerdureError` unless every side is a multiple of the stride."""
    if any(side % stride for side in size):
        sides = " x ".join(str(side) for side in size)
        raise PerdureError(
            f"a crop of {sides} pixels does not fit the network's stride of {stride}",
            f"choose sides that are multiples of {stride}, e.g. {max(1, round(size[0] / stride)) * stride}",
        )


def grid_pixels(maps: Tensor, stride: int) -> Tensor:
    """G(x): pixel ``stride // 2`` of each cell. ``(N, *S) -> (N, *s)``. Raises as :func:`check_size`."""
    check_size(maps.shape[1:], stride)
    return maps[(slice(None), *[slice(stride // 2, None, stride)] * (maps.dim() - 1))]


def core_pixels(maps: Tensor, stride: int) -> Tensor:
    """Core pixels of each cell, ``(N, *S) -> (P, N, *s)``; the last of the P is G(x).

    The mean over P of a mask equals its linear resize to the grid. P is 2 to the number of axes for an even
    stride and 1 for an odd one. Raises as :func:`check_size`.
    """
    check_size(maps.shape[1:], stride)
    corners = product(_offsets(stride), repeat=maps.dim() - 1)
    return torch.stack([maps[(slice(None), *[slice(o, None, stride) for o in corner])] for corner in corners])


def core_logits(logits: Tensor, stride: int) -> Tensor:
    """Linearly upsampled logits at the core pixels, ``(N, C, *s) -> (P, N, C, *s)`` float32, ordered alike.

    Equal to upsampling to full size and picking: a core pixel lies ``0.5 / stride`` cells beside its cell's
    centre, so it is a weighted mean of the cell and its neighbour (itself at the border).
    """
    found = [logits.float()]
    for axis in range(2, logits.dim()):
        found = [_beside(z, axis, step, 0.5 / stride) for z in found for step in _steps(stride)]
    return torch.stack(found)


def _offsets(stride: int) -> tuple[int, ...]:
    return (stride // 2,) if stride % 2 else (stride // 2 - 1, stride // 2)


def _steps(stride: int) -> tuple[int, ...]:
    return (0,) if stride % 2 else (-1, 1)


def _beside(z: Tensor, axis: int, step: int, weight: float) -> Tensor:
    """Value ``weight`` of the way to the neighbour before (-1) or after (+1) along an axis."""
    if step == 0:
        return z
    last = z.shape[axis] - 1
    ends = (
        (z.narrow(axis, 0, 1), z.narrow(axis, 0, last))
        if step < 0
        else (z.narrow(axis, 1, last), z.narrow(axis, last, 1))
    )
    return z.lerp(torch.cat(ends, axis), weight)
