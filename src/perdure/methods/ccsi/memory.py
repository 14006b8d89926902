"""What CCSI keeps of the past, and the sums over a task's training images that it is computed from.

All sums are float64 or int64 and add up over batches and processes.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.errors import UsageError
from perdure.kept.items import Kept
from perdure.methods.inversion.norm_statistics import Probe
from perdure.networks.classifier import Classifier

SLACK: Final = 1e-3
"""How far images may lie outside [0, 1] by rounding."""


def class_sums(images: Tensor, codes: Tensor, classes: int, features: Tensor | None = None) -> dict[str, Tensor]:
    """Sums of images and of unit features of every class.

    Args:
        images: ``(N, C, H, W)`` in [0, 1].
        codes: Class of each image ``(N,)`` int64 in 0..classes-1.
        classes: Number of classes n.
        features: ``(N, d)``, or ``None`` where no weights will be imprinted.

    Returns:
        ``counts (n,)`` int64, ``images (n, C, H, W)`` float64 and, with features, ``directions (n, d)`` float64.

    Raises:
        UsageError: The images are normalised to another range.
    """
    if bool((images.min() < -SLACK) | (images.max() > 1 + SLACK)):
        raise UsageError(
            f"images hold values from {images.min():.2f} to {images.max():.2f}, but class means are kept as grey "
            "values from 0 to 1",
            "set augment.mean to 0 and augment.std to 1 for every channel",
        )
    sums = {"counts": torch.bincount(codes, minlength=classes), "images": _sum_by_class(images, codes, classes)}
    if features is not None:
        sums["directions"] = _sum_by_class(F.normalize(features.float(), dim=1), codes, classes)
    return sums


def mean_images(sums: dict[str, Tensor]) -> Tensor:
    """Class mean images ``(n, C, H, W)`` uint8 (spec 3.2), from the totals of :func:`class_sums`."""
    counts = sums["counts"].clamp(min=1).view(-1, 1, 1, 1)
    return (sums["images"] / counts * 255).clamp(0, 255).round().to(torch.uint8)


def mean_directions(sums: dict[str, Tensor]) -> Tensor:
    """Unit vectors ``(n, d)`` float32 along the mean of each class's unit features; new weights start there (2.4)."""
    return F.normalize(sums["directions"], dim=1).float()


@torch.no_grad()
def class_moment_sums(network: Classifier, images: Tensor, codes: Tensor, classes: int) -> dict[str, Tensor]:
    """Sums, over the images of a batch, of the moments of groups of channels in all ContinualNorm layers (spec 3.5).

    Args:
        network: Used in evaluation mode.
        images: ``(N, C, H, W)``.
        codes: Class of each ``(N,)`` int64 in 0..classes-1.
        classes: Number of classes n.

    Returns:
        ``moment_counts (n,)`` int64; ``moment_sums`` and ``moment_squares (n, groups, 2)`` float64, of group means
        and group variances.
    """
    probe = Probe(network)
    values = torch.stack(probe.channel_groups(probe(images)[2]), 2).double()
    return {
        "moment_counts": torch.bincount(codes, minlength=classes),
        "moment_sums": _sum_by_class(values, codes, classes),
        "moment_squares": _sum_by_class(values.square(), codes, classes),
    }


def class_moments(sums: dict[str, Tensor]) -> Tensor:
    """Moments of every class ``(n, groups, 4)`` float32 from the totals of :func:`class_moment_sums`.

    The last axis holds the mean of the group means, the mean of the group variances, and the standard deviation
    (biased) of either; all over the images of the class. 16 bytes per group: 576 bytes per class for the small network.
    """
    counts = sums["moment_counts"].clamp_min(1)[:, None, None]
    mean = sums["moment_sums"] / counts
    deviation = (sums["moment_squares"] / counts - mean.square()).clamp_min(0).sqrt()
    return torch.cat([mean, deviation], 2).float()


def _sum_by_class(values: Tensor, codes: Tensor, classes: int) -> Tensor:
    total = torch.zeros(classes, *values.shape[1:], dtype=torch.float64, device=values.device)
    return total.index_add_(0, codes, values.double())


class Memory(nn.Module):
    """What crosses the boundary of a task, one row per class in learning order: no image of any patient.

    ``means (K, C, H, W)`` uint8; ``moments (K, groups, 4)`` float32; ``impressions (K, n)`` and ``reference (K, m)``
    float32, root-mean-square distances in grey values (NaN where none was measured); ``preview (K, n, C, H, W)``
    uint8, for the report and never read again. A buffer without content is ``None``.
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

    def show(self, images: Tensor, labels: Tensor, classes: int, count: int) -> None:
        """Store the first ``count`` impressions of every class for the report; black where there are fewer."""
        if not count:
            return
        preview = torch.zeros(classes, count, *images.shape[1:], dtype=torch.uint8)
        for label in range(classes):
            mine = images[labels == label][:count]
            preview[label, : len(mine)] = (mine.clamp(0, 1) * 255).round().to(torch.uint8)
        self.preview = preview

    def kept(self, fewest: int | None) -> list[Kept]:
        """The items of the ledger, for buffers that have content; ``fewest``: images of the task's rarest class."""
        items = []
        if self.means is not None:
            text = "mean over all training images of the class, 8 bits a pixel, computed when the class was learned"
            keys: tuple[str, ...] = ("memory.means",)
            means = Kept("means", "statistics", keys, text, per_class=True, shows="images", from_images=fewest)
            items.append(means)
        if self.moments is not None:
            text = (
                "mean and deviation over the class's training images of their group means and variances in every "
                "normalisation layer, after the task that taught the class"
            )
            items.append(Kept("moments", "statistics", ("memory.moments",), text, per_class=True))
        if self.impressions is not None:
            text = (
                "distance of each impression to the nearest training image of its class, and of some training images "
                "to their nearest other one; measured before the task's data was closed"
            )
            keys = ("memory.impressions", "memory.reference")
            items.append(Kept("distances", "statistics", keys, text, shows="distances"))
        if self.preview is not None:
            text = "optimised from class means against the frozen network, without any image"
            items.append(Kept("impressions", "preview", ("memory.preview",), text, shows="images", from_images=fewest))
        return items


def append_rows(rows: Tensor | None, more: Tensor) -> Tensor:
    """Rows of the new classes below those so far; tables ``(K, n)`` of unequal width are filled up with NaN."""
    if rows is None:
        return more
    if rows.ndim == 2:
        width = max(rows.shape[1], more.shape[1])
        rows, more = (F.pad(part, (0, width - part.shape[1]), value=float("nan")) for part in (rows, more))
    return torch.cat([rows, more])
