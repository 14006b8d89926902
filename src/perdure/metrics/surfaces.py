"""Distances between the surfaces of ground truth and prediction of one case, in millimetres."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from perdure.data.case import Geometry
from perdure.data.volumes.extra import need

Floats = npt.NDArray[np.float64]
MARGIN: Final = 1
"""Pixels around a structure that are looked at: erosion, which finds its surface, has to see where it ends."""


def in_mm(geometry: Geometry, axes: int) -> bool:
    """Whether distances in an image of so many spatial axes can be given in millimetres."""
    known = all(math.isfinite(step) and step > 0 for step in geometry.spacing)
    return geometry.unit == "mm" and len(geometry.spacing) == axes > 0 and known


def surface_figures(truth: Tensor, guess: Tensor, count: int, spacing: Sequence[float], tolerance: float) -> Floats:
    """HD95 and ASD in mm and NSD in percent of each class of one case.

    Surfaces are the pixels of a structure that have a neighbour outside of it, and those at the edge of the image. With
    the distances of the surface pixels of each of the two structures to the surface of the other one, HD95 is the
    larger one of the two 95th percentiles (Huttenlocher 1993), ASD the mean over all surface pixels of both, NSD the
    share of these that are within the tolerance (Nikolov 2018). A class that only one of the two holds has an NSD of 0,
    and as HD95 and ASD the diagonal of the image: the largest distance that there can be, so that a structure which is
    not found never makes a figure better. Values are those of MONAI's functions of the whole images.

    Args:
        truth: Row of each pixel in the ground truth ``(*S)``, see :func:`perdure.metrics.confusion.paired`.
        guess: Its column, same shape. Pixels that are dropped belong to no structure.
        count: Number of labels, label 0 included.
        spacing: Millimetres between neighbouring pixels along each axis.
        tolerance: Of NSD, in mm.

    Returns:
        ``(count, 3)``; NaN for label 0 and for classes that neither of the two holds.

    Raises:
        UsageError: MONAI or scipy is not installed.
    """
    need("monai")
    import torch
    from scipy.ndimage import find_objects

    # rows + 1, and 0 for nothing, as find_objects wants it: one pass finds the boxes of all classes
    true = (truth + 1).to(torch.int32).cpu()
    said = (guess + 1).masked_fill((truth < 0) | (guess >= count), 0).to(torch.int32).cpu()
    boxes = zip(find_objects(true.numpy(), count), find_objects(said.numpy(), count), strict=True)
    steps = [float(step) for step in spacing]  # MONAI refuses a mixture with whole numbers
    diagonal = math.hypot(*(step * side for step, side in zip(steps, true.shape, strict=True)))
    figures = np.full((count, 3), np.nan)
    for row, (first, other) in enumerate(boxes):
        if row == 0 or (first is None and other is None):
            continue
        if first is None or other is None:
            figures[row] = diagonal, diagonal, 0.0
            continue
        box = tuple(
            slice(max(0, min(a.start, b.start) - MARGIN), max(a.stop, b.stop) + MARGIN)
            for a, b in zip(first, other, strict=True)
        )
        figures[row] = _between(true[box] == row + 1, said[box] == row + 1, steps, tolerance)
    return figures


def _between(truth: Tensor, guess: Tensor, spacing: list[float], tolerance: float) -> tuple[float, float, float]:
    """HD95, ASD and NSD of two structures ``(*S)`` bool, both with at least one pixel.

    From one set of distances: MONAI's three functions find surfaces and distances anew, each for itself. Its function
    that gives both at once warns, in version 1.6, of an argument of its own.
    """
    from monai.metrics.utils import get_mask_edges, get_surface_distance

    edges = get_mask_edges(guess, truth)
    # numpy, because torch.quantile refuses more than 16 million values
    one = np.asarray(get_surface_distance(edges[0], edges[1], spacing=spacing))
    other = np.asarray(get_surface_distance(edges[1], edges[0], spacing=spacing))
    both = np.concatenate([one, other])
    hd95 = max(np.percentile(one.astype(np.float64), 95), np.percentile(other.astype(np.float64), 95))
    # the distances are float32, and 0.3 mm in that precision is more than 0.3
    return float(hd95), float(both.mean(dtype=np.float64)), 100 * float((both <= np.float32(tolerance)).mean())
