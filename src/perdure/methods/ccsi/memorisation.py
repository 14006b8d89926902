"""How near impressions come to training images, measured while the task's data is open.

The smallest of many numbers is no sum, but a histogram is: every impression counts the training images of its class
by distance, counts of batches and processes are added, and the first bin that is not empty holds the nearest image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from perdure.data.case import Batch, collate
from perdure.data.dataset import Samples
from perdure.methods.losses import channels_of

BINS: Final = 1025
"""Distances 0, 1/1024, … 1, each rounded to the nearest; greater ones count as 1."""
REFERENCES: Final = 64
"""Training images per task whose nearest other training image says how close real images come to each other."""


class Neighbours:
    """Impressions of a task's classes, and some of its training images for comparison.

    Args:
        images: Impressions ``(n, C, H, W)``.
        codes: Position of their class among ``class_ids`` ``(n,)`` int64.
        train: The training images; :data:`REFERENCES` of them, evenly spread, are read now.
        class_ids: Ids of the task's classes.
    """

    def __init__(self, images: Tensor, codes: Tensor, train: Samples, class_ids: Sequence[int]) -> None:
        self.images, self.codes, self.class_ids = images, codes, tuple(class_ids)
        positions = np.unique(np.linspace(0, len(train) - 1, REFERENCES).round().astype(int)).tolist()
        own = collate([train[position] for position in positions])
        self.references, self.names = own.images.to(images.device), own.names
        self.reference_codes = channels_of(own.labels, self.class_ids).to(images.device)

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """Counts of distances to the images of a batch; they add up over batches."""
        codes = channels_of(batch.labels, self.class_ids)
        itself = torch.tensor([[a == b for b in batch.names] for a in self.names], device=codes.device)
        return {
            "impressions": distance_counts(batch.images, codes, self.images, self.codes),
            "reference": distance_counts(batch.images, codes, self.references, self.reference_codes, itself),
        }

    def distances(self, sums: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Nearest distances by class, ``(classes, n)`` of impressions and ``(classes, m)`` of training images."""
        tables = []
        for name, codes in (("impressions", self.codes), ("reference", self.reference_codes)):
            values = nearest(sums[name])
            rows = [*(values[codes == row] for row in range(len(self.class_ids))), values.new_zeros(1)]
            # filled up with NaN; the last row is there so that the table has a column
            tables.append(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=float("nan"))[:-1])
        return tables[0], tables[1]


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
