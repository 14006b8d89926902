"""How close impressions come to training images, measured while the task's data is open."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from perdure.data.dataset import Batch, Dataset, collate
from perdure.methods.ccsi.memorisation import distance_counts, nearest
from perdure.methods.losses import channels_of

REFERENCES = 64
"""Training images a task whose nearest other training image says how close real images come to each other."""


class Neighbours:
    """Impressions of a task's classes, and some of its training images for comparison.

    Args:
        images: Impressions ``(n, C, H, W)``.
        codes: Position of their class among ``class_ids`` ``(n,)`` int64.
        view: The training images; :data:`REFERENCES` of them, evenly spread, are read now.
        class_ids: Ids of the task's classes.
    """

    def __init__(self, images: Tensor, codes: Tensor, view: Dataset, class_ids: Sequence[int]) -> None:
        self.images, self.codes, self.class_ids = images, codes, tuple(class_ids)
        positions = np.unique(np.linspace(0, len(view) - 1, REFERENCES).round().astype(int)).tolist()
        own = collate([view[position] for position in positions])
        self.references = own.images.to(images.device)
        self.reference_codes = channels_of(own.labels, self.class_ids).to(images.device)
        self.names = own.names

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
        return (
            self._by_class(nearest(sums["impressions"]), self.codes),
            self._by_class(nearest(sums["reference"]), self.reference_codes),
        )

    def _by_class(self, values: Tensor, codes: Tensor) -> Tensor:
        """Values of each class in a row, filled up with NaN."""
        width = max(1, int(torch.bincount(codes, minlength=len(self.class_ids)).max()))
        table = torch.full((len(self.class_ids), width), float("nan"), device=values.device)
        for row in range(len(self.class_ids)):
            mine = values[codes == row]
            table[row, : len(mine)] = mine
        return table
