"""What one pass over a task's training images tells of its classes, as sums that add up over batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.errors import UsageError

SLACK = 1e-3


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
    sums = {
        "counts": torch.bincount(codes, minlength=classes),
        "images": _sums(images, codes, classes),
    }
    if features is not None:
        sums["directions"] = _sums(F.normalize(features.float(), dim=1), codes, classes)
    return sums


def mean_images(sums: dict[str, Tensor]) -> Tensor:
    """Class mean images ``(n, C, H, W)`` uint8 (spec 3.2), from the totals of :func:`class_sums`."""
    counts = sums["counts"].clamp(min=1).view(-1, 1, 1, 1)
    return (sums["images"] / counts * 255).clamp(0, 255).round().to(torch.uint8)


def mean_directions(sums: dict[str, Tensor]) -> Tensor:
    """Unit vectors ``(n, d)`` float32 along the mean of each class's unit features; new weights start there (2.4)."""
    return F.normalize(sums["directions"], dim=1).float()


def _sums(values: Tensor, codes: Tensor, classes: int) -> Tensor:
    total = torch.zeros(classes, *values.shape[1:], dtype=torch.float64, device=values.device)
    return total.index_add_(0, codes, values.double())
