"""How near impressions come to training images: distances that can be counted batch by batch and added up.

The smallest of many numbers is no sum, but a histogram is: every impression counts the training images of its class
by distance, counts of batches and processes are added, and the first bin that is not empty holds the nearest image.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

BINS: Final = 1025
"""Distances 0, 1/1024, … 1, each rounded to the nearest; greater ones count as 1."""


@torch.no_grad()
def distance_counts(
    batch_images: Tensor, batch_codes: Tensor, images: Tensor, codes: Tensor, exclude: Tensor | None = None
) -> Tensor:
    """Count the images of a batch by their distance to each of ``images``, where the class is the same.

    The distance is the root of the mean squared difference over all pixels and channels: 0 for a copy, 1 between
    black and white.

    Args:
        batch_images: Training images ``(b, C, H, W)`` in [0, 1].
        batch_codes: Their classes ``(b,)``.
        images: Impressions ``(n, C, H, W)``.
        codes: Their classes ``(n,)``.
        exclude: Pairs not to count ``(n, b)`` bool, such as a training image and itself.

    Returns:
        ``(n, BINS)`` int64.
    """
    # Around grey: the product form of the distance loses digits where images lie far from 0.
    here, there = ((part.flatten(1).float() - 0.5) for part in (images, batch_images))
    apart = torch.cdist(here, there, compute_mode="use_mm_for_euclid_dist") / here.shape[1] ** 0.5
    bins = (apart * (BINS - 1)).round().clamp_(0, BINS - 1).long()
    counted = codes[:, None] == batch_codes[None]
    if exclude is not None:
        counted &= ~exclude
    counts = torch.zeros(len(images), BINS, dtype=torch.int64, device=images.device)
    return counts.scatter_add_(1, bins, counted.long())


def nearest(counts: Tensor) -> Tensor:
    """Distance to the nearest counted image ``(n,)`` float32, a multiple of 1/1024; NaN where none was counted.

    Args:
        counts: Sum of :func:`distance_counts` over all batches ``(n, BINS)``.
    """
    found = counts > 0
    first = found.to(torch.uint8).argmax(1).float() / (BINS - 1)
    return torch.where(found.any(1), first, torch.nan)
