"""What CCSI keeps of the past, in learning order: no image of anybody, only what is computed from many."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perdure.kept.items import Kept

MEANS = "mean over all training images of the class, 8 bits a pixel, computed when the class was learned"
MOMENTS = (
    "mean and deviation over the class's training images of their group means and variances in every normalisation "
    "layer, after the task that taught the class"
)
DISTANCES = (
    "distance of each impression to the nearest training image of its class, and of some training images to their "
    "nearest other one; measured before the task's data was closed"
)
PREVIEW = "optimised from class means against the frozen network, without any image"


class Memory(nn.Module):
    """Rows a class: ``means (K, C, H, W)`` uint8, ``moments (K, ...)`` float32, distances, and a few impressions.

    ``impressions (K, n)`` and ``reference (K, m)`` float32 are root-mean-square distances in grey values (NaN where
    none was measured); ``preview (K, n, C, H, W)`` uint8 is for the report and never read again.
    """

    means: Tensor | None
    moments: Tensor | None
    impressions: Tensor | None
    reference: Tensor | None
    preview: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        for name in ("means", "moments", "impressions", "reference", "preview"):
            self.register_buffer(name, None)

    def add_means(self, means: Tensor) -> None:
        """Append the new classes' mean images."""
        self.means = means if self.means is None else torch.cat([self.means, means])

    def add_moments(self, moments: Tensor) -> None:
        """Append the new classes' moments."""
        self.moments = moments if self.moments is None else torch.cat([self.moments, moments])

    def add_distances(self, impressions: Tensor, reference: Tensor) -> None:
        """Append the new classes' distances, ``(new, n)`` and ``(new, m)``."""
        self.impressions = _stack(self.impressions, impressions)
        self.reference = _stack(self.reference, reference)

    def show(self, images: Tensor, labels: Tensor, classes: int, count: int) -> None:
        """Remember the first ``count`` impressions of every class for the report; black where there are fewer."""
        if not count:
            return
        preview = torch.zeros(classes, count, *images.shape[1:], dtype=torch.uint8)
        for label in range(classes):
            mine = images[labels == label][:count]
            preview[label, : len(mine)] = (mine.clamp(0, 1) * 255).round().to(torch.uint8)
        self.preview = preview

    def kept(self) -> list[Kept]:
        """What of it exists, for the ledger."""
        items = [
            Kept("means", "statistics", ("memory.means",), MEANS, per_class=True, shows="images"),
            Kept("moments", "statistics", ("memory.moments",), MOMENTS, per_class=True),
            Kept("distances", "statistics", ("memory.impressions", "memory.reference"), DISTANCES, shows="distances"),
            Kept("impressions", "preview", ("memory.preview",), PREVIEW, shows="images"),
        ]
        return [item for item in items if getattr(self, item.keys[0].removeprefix("memory.")) is not None]


def _stack(rows: Tensor | None, more: Tensor) -> Tensor:
    """Rows of unequal length below each other, short ones filled up with NaN."""
    if rows is None:
        return more
    width = max(rows.shape[1], more.shape[1])
    filled = [nn.functional.pad(part, (0, width - part.shape[1]), value=float("nan")) for part in (rows, more)]
    return torch.cat(filled)
