"""What STAR reads off the feature grid (spec 3.1, 3.2): labels, the old network's answers, and sums over cells.

A grid cell covers ``stride`` pixels along each axis. ``G(x)`` of the paper takes the pixel ``stride // 2`` of
each cell. A linear resize (corners not aligned) of a map to the grid averages the pixels next to the cell's
centre: two per axis for an even stride, one for an odd one. These *core* pixels are all that STAR's masks need, so
pseudo-labels are computed there only: 4 of 256 pixels at stride 16.

Sums are float64 or int64 and add over batches and processes: for given weights counts do not depend on either, and
other sums do by rounding alone. (Training does depend on the number of processes, and with it the weights.) ``codes``
are rows of new classes on the feature grid, -1 where a cell does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.errors import PerdureError


def _check_size(size: Sequence[int], stride: int) -> None:
    """Raise :class:`PerdureError` unless every side is a multiple of the stride."""
    if any(side % stride for side in size):
        sides = " x ".join(str(side) for side in size)
        raise PerdureError(
            f"a crop of {sides} pixels does not fit the network's stride of {stride}",
            f"choose sides that are multiples of {stride}, e.g. {max(1, round(size[0] / stride)) * stride}",
        )


def grid_pixels(maps: Tensor, stride: int) -> Tensor:
    """G(x): pixel ``stride // 2`` of each cell, ``(N, *S) -> (N, *s)``. Raises as :func:`core_pixels`."""
    _check_size(maps.shape[1:], stride)
    return maps[(slice(None), *[slice(stride // 2, None, stride)] * (maps.dim() - 1))]


def core_pixels(maps: Tensor, stride: int) -> Tensor:
    """Core pixels of each cell, ``(N, *S) -> (P, N, *s)``; the last of the P is G(x).

    The mean over P of a mask equals its linear resize to the grid. P is 2 to the number of axes for an even
    stride and 1 for an odd one.

    Raises:
        PerdureError: A side is no multiple of the stride.
    """
    _check_size(maps.shape[1:], stride)
    offsets = (stride // 2,) if stride % 2 else (stride // 2 - 1, stride // 2)
    corners = product(offsets, repeat=maps.dim() - 1)
    return torch.stack([maps[(slice(None), *[slice(o, None, stride) for o in corner])] for corner in corners])


def core_logits(logits: Tensor, stride: int) -> Tensor:
    """Linearly upsampled logits at the core pixels, ``(N, C, *s) -> (P, N, C, *s)`` float32, ordered alike.

    Equal to upsampling to full size and picking: a core pixel lies ``0.5 / stride`` cells beside its cell's
    centre, so it is a weighted mean of the cell and its neighbour (itself at the border).
    """
    found = [logits.float()]
    for axis in range(2, logits.dim()) if stride % 2 == 0 else ():  # with an odd stride the centre is a pixel
        last = logits.shape[axis] - 1
        beside: list[Tensor] = []
        for z in found:
            before = torch.cat([z.narrow(axis, 0, 1), z.narrow(axis, 0, last)], axis)
            after = torch.cat([z.narrow(axis, 1, last), z.narrow(axis, last, 1)], axis)
            beside += [z.lerp(before, 0.5 / stride), z.lerp(after, 0.5 / stride)]
        found = beside
    return torch.stack(found)


def tally(codes: Tensor, size: int) -> Tensor:
    """Number of cells of each code 0..size-1, ``(size,)`` int64; -1 is not counted."""
    return torch.bincount(codes.flatten() + 1, minlength=size + 1)[1:]


def pseudo_labels(logits: Tensor, threshold: float) -> Tensor:
    """Labels q of 3.2: 1 + the strongest old channel where its raw logit exceeds the threshold, else 0.

    Args:
        logits: ``(..., C, *s)`` with the channel axis at position 2: ``(P, N, C, *s)``.
        threshold: On the raw logit; 0.5 means a probability of 0.622 (Q2).
    """
    best, channel = logits.max(2)
    return torch.where(best > threshold, channel + 1, 0)


def feature_sums(features: Tensor, codes: Tensor, classes: int) -> dict[str, Tensor]:
    """Sums for prototypes and norms: unit vectors, cells, norms and squared norms of each class.

    Args:
        features: ``(N, D, *s)``.
        codes: ``(N, *s)``.
        classes: Number of new classes C.

    Returns:
        ``directions (C, D)`` float64, ``cells (C,)`` int64, ``norms (C,)`` and ``squares (C,)`` float64.
    """
    vectors, rows = _labelled(features, codes)
    norms = vectors.norm(dim=1)
    return {
        "directions": vectors.new_zeros(classes, features.shape[1]).index_add_(0, rows, F.normalize(vectors, dim=1)),
        "cells": torch.bincount(rows, minlength=classes),
        "norms": norms.new_zeros(classes).index_add_(0, rows, norms),
        "squares": norms.new_zeros(classes).index_add_(0, rows, norms.square()),
    }


def spread_sums(features: Tensor, codes: Tensor, centres: Tensor) -> dict[str, Tensor]:
    """Sums for spreads: squared distance to the centre, channel by channel.

    Args:
        features: ``(N, D, *s)``.
        codes: ``(N, *s)``.
        centres: ``(C, D)`` prototype of each new class.

    Returns:
        ``squares (C, D)`` float64, ``cells (C,)`` int64.
    """
    vectors, rows = _labelled(features, codes)
    squares = (F.normalize(vectors, dim=1) - centres.double()[rows]).square()
    return {
        "squares": torch.zeros_like(centres, dtype=torch.float64).index_add_(0, rows, squares),
        "cells": torch.bincount(rows, minlength=len(centres)),
    }


def prototypes_and_norms(sums: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the sums of :func:`feature_sums` become.

    Returns:
        Unit sums of unit vectors ``(C, D)``, zeros for a class without cells; mean and unbiased standard deviation of
        the norms ``(C, 2)``, 0 where there are too few cells.
    """
    cells = sums["cells"].double()
    mean = sums["norms"] / cells.clamp_min(1.0)
    # rounding may leave a sum of squares just below 0
    around = (sums["squares"] - mean * sums["norms"]).clamp_min(0.0)
    norms = torch.stack([mean, (around / (cells - 1.0).clamp_min(1.0)).sqrt()], 1)
    return F.normalize(sums["directions"], dim=1), norms


def spreads_from(sums: dict[str, Tensor]) -> Tensor:
    """Root mean squared distance to the centre by channel, ``(C, D)``; zeros for a class without cells."""
    return (sums["squares"] / sums["cells"].double().clamp_min(1.0)[:, None]).sqrt()


def _labelled(features: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors ``(M, D)`` float64 of the cells that count, and their rows ``(M,)``."""
    # float64: an epoch adds up millions of cells, and the sums must not depend on the batches
    counts = codes >= 0
    return features.movedim(1, -1)[counts].double(), codes[counts]
