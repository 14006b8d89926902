"""Losses of synthesis and update, as pure functions of tensors (spec CCSI, sections 8.2 and 8.5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.labels import BACKGROUND, IGNORE

NOTHING = -1
"""Row of a pixel without a class in a layout."""


def edge_band(layouts: Tensor, width: int) -> Tensor:
    """Pixels within ``width`` of an edge between two labels: ``(N, H, W)`` -> bool ``(N, H, W)``.

    Distance is counted in steps to any of eight neighbours. Nothing for a width of 0.
    """
    if width == 0:
        return torch.zeros_like(layouts, dtype=torch.bool)
    maps = layouts[:, None].float()
    side = 2 * width + 1
    # a pooling window that reaches over the image's border sees only what is inside
    highest = F.max_pool2d(maps, side, 1, width)
    lowest = -F.max_pool2d(-maps, side, 1, width)
    return (highest != lowest)[:, 0]


def hot(layouts: Tensor, classes: int) -> Tensor:
    """One-hot masks ``(N, K, H, W)`` float32 of rows ``(N, H, W)``; pixels without a class are 0 everywhere."""
    rows = torch.arange(classes, device=layouts.device).view(1, -1, 1, 1)
    return (layouts[:, None] == rows).float()


def balanced_bce(logits: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    """Binary cross-entropy in which positives and negatives of each channel weigh alike (8.2 a and c).

    For each image and channel the mean over its positive pixels plus the mean over its negative ones; a side
    without pixels is left out. Summed over channels, mean over images.

    Args:
        logits: ``(N, K, H, W)``.
        targets: ``(N, K, H, W)``, 0 or 1.
        counts: ``(N, H, W)`` bool, pixels that count.
    """
    weight = counts[:, None].to(logits)
    positive, negative = targets * weight, (1 - targets) * weight
    area_1, area_0 = (part.sum((2, 3)).clamp_min(1.0) for part in (positive, negative))
    loss = (F.softplus(-logits) * positive).sum((2, 3)) / area_1
    loss = loss + (F.softplus(logits) * negative).sum((2, 3)) / area_0
    return loss.sum(1).mean()


def dice_loss(logits: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    """1 − soft Dice over the classes that an image's target holds; mean over these classes and over images.

    Args:
        logits: ``(N, K, H, W)``.
        targets: ``(N, K, H, W)``, 0 or 1.
        counts: ``(N, H, W)`` bool, pixels that count.
    """
    weight = counts[:, None].to(logits)
    there = targets.flatten(2).amax(2)
    chance, wanted = logits.sigmoid() * weight, targets * weight
    overlap = 2 * (chance * wanted).sum((2, 3))
    dice = overlap / (chance.sum((2, 3)) + wanted.sum((2, 3))).clamp_min(1e-6)
    return ((1 - dice) * there).sum() / there.sum().clamp_min(1.0)


def agreement(labels: Tensor, layouts: Tensor, classes: int) -> Tensor:
    """Dice of rows against a layout, image by image: mean over the layout's classes, ``(N,)``; 0 without any.

    Args:
        labels: Rows ``(N, H, W)`` that the teacher sees.
        layouts: Rows ``(N, H, W)`` that were asked for.
        classes: Number of rows.
    """
    seen, asked = hot(labels, classes).flatten(2), hot(layouts, classes).flatten(2)
    there = asked.amax(2)
    dice = 2 * (seen * asked).sum(2) / (seen.sum(2) + asked.sum(2)).clamp_min(1.0)
    return (dice * there).sum(1) / there.sum(1).clamp_min(1.0)


def believed(logits: Tensor, class_ids: Tensor, confidence: float) -> Tensor:
    """What a network sees, where it is sure: global ids ``(N, H, W)``, 0 background, ignore where it is not sure.

    A pixel shows its likeliest class if that has a sigmoid above 0.5, else background. The certainty of a class is
    its sigmoid, that of background 1 − the highest sigmoid (8.2, relabelling; 8.5, pseudo-labels).

    Args:
        logits: ``(N, K, H, W)``.
        class_ids: ``(K,)`` int64.
        confidence: Least certainty, at least 0.5.
    """
    best, channel = logits.sigmoid().max(1)
    labels = torch.where(best > 0.5, class_ids[channel], BACKGROUND)
    return torch.where(torch.maximum(best, 1 - best) >= confidence, labels, IGNORE)


def less_forget(features: Tensor, before: Tensor) -> Tensor:
    """Less-forget distillation: mean over cells of 1 − cos of features ``(N, D, h, w)`` now and before (8.5)."""
    return (1.0 - F.cosine_similarity(features, before, dim=1)).mean()


def pixel_margin(logits: Tensor, labels: Tensor, class_ids: Tensor, margin: float) -> Tensor:
    """Old pixels must prefer their own class to the best new one: mean of max(0, m − z_y + max z_new) (8.5).

    Args:
        logits: ``(N, K, H, W)``, old classes first.
        labels: Global ids ``(N, H, W)``; pixels whose label is not in ``class_ids`` do not count.
        class_ids: ``(K_old,)`` ids of the old channels.
        margin: m, in logits.

    Returns:
        Scalar; 0 with a zero gradient where no pixel counts.
    """
    old = len(class_ids)
    targets = (labels[:, None] == class_ids.view(1, -1, 1, 1)).to(logits)
    own, rival = (logits[:, :old] * targets).sum(1), logits[:, old:].amax(1)
    mine = targets.sum(1)
    return (F.relu(margin - own + rival) * mine).sum() / mine.sum().clamp_min(1.0)
