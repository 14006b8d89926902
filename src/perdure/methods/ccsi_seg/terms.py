"""Losses of synthesis and update, as pure functions of tensors (spec CCSI, sections 8.2 and 8.5).

All compute in float32, whatever the precision of their input and of an autocast around them: a sum over the pixels of
an image overflows in float16, and bfloat16 counts no further than 256.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.labels import BACKGROUND, IGNORE

NOTHING: Final = -1
"""Row of a pixel without a class in a layout."""
SLIGHT: Final = 1e-4
"""Added to variances before they divide."""


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


def one_hot(layouts: Tensor, classes: int) -> Tensor:
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
    logits, targets = logits.float(), targets.float()
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
    logits, targets = logits.float(), targets.float()
    weight = counts[:, None].to(logits)
    dice, there = _dice(logits.sigmoid() * weight, targets * weight, targets)
    return ((1 - dice) * there).sum() / there.sum().clamp_min(1.0)


def agreement(labels: Tensor, layouts: Tensor, classes: int) -> Tensor:
    """Dice of rows against a layout, image by image: mean over the layout's classes, ``(N,)``; 0 without any.

    Args:
        labels: Rows ``(N, H, W)`` that the teacher predicts.
        layouts: Rows ``(N, H, W)`` that were asked for.
        classes: Number of rows.
    """
    asked = one_hot(layouts, classes)
    dice, there = _dice(one_hot(labels, classes), asked, asked)
    return (dice * there).sum(1) / there.sum(1).clamp_min(1.0)


def _dice(found: Tensor, wanted: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Dice of maps ``(N, K, H, W)`` in 0..1, and which classes the targets hold, 0 or 1: ``(N, K)`` each."""
    overlap = 2 * (found * wanted).sum((2, 3))
    return overlap / (found.sum((2, 3)) + wanted.sum((2, 3))).clamp_min(1e-6), targets.amax((2, 3))


def pseudo_labels(logits: Tensor, class_ids: Sequence[int], confidence: float) -> Tensor:
    """What a network predicts, where it is sure: global ids ``(N, H, W)``, 0 background, ignore where it is not sure.

    A pixel shows its likeliest class if that has a sigmoid above 0.5, else background. The certainty of a class is
    its sigmoid, that of background 1 − the highest sigmoid (8.2, relabelling; 8.5, pseudo-labels).

    Args:
        logits: ``(N, K, H, W)``.
        class_ids: Global id of each channel.
        confidence: Least certainty, at least 0.5.
    """
    best, channel = logits.float().sigmoid().max(1)
    labels = torch.where(best > 0.5, torch.as_tensor(class_ids, device=logits.device)[channel], BACKGROUND)
    return torch.where(torch.maximum(best, 1 - best) >= confidence, labels, IGNORE)


def pixel_margin(logits: Tensor, labels: Tensor, class_ids: Sequence[int], margin: float) -> Tensor:
    """Old pixels must prefer their own class to the best new one: mean of max(0, m − z_y + max z_new) (8.5).

    Args:
        logits: ``(N, K, H, W)``, old classes first.
        labels: Global ids ``(N, H, W)``; pixels whose label is not in ``class_ids`` do not count.
        class_ids: Global ids of the old channels.
        margin: m, in logits.

    Returns:
        Scalar; 0 with a zero gradient where no pixel counts.
    """
    logits, old = logits.float(), len(class_ids)
    targets = (labels[:, None] == torch.as_tensor(class_ids, device=labels.device).view(1, -1, 1, 1)).to(logits)
    own, rival = (logits[:, :old] * targets).sum(1), logits[:, old:].amax(1)
    mine = targets.sum(1)
    return (F.relu(margin - own + rival) * mine).sum() / mine.sum().clamp_min(1.0)


def moment_loss(now: Tensor, bank: Tensor, layers: Tensor, first: float) -> Tensor:
    """Distance of moments from the bank per mask: mean over layers of the relative error of means and of variances.

    The error of a mean is in units of the bank's deviation, that of a variance in units of the bank's variance; the
    channels of a layer are taken together as a root mean square (8.3, relative error per channel).

    Args:
        now: Mean and variance ``(2, R, T)``.
        bank: ``(2, R, T)``.
        layers: Layer of each channel ``(T,)``.
        first: Weight of the first layer; the others weigh 1.

    Returns:
        ``(R,)``.
    """
    now, bank = now.float(), bank.float()
    scale = bank[1] + SLIGHT
    errors = torch.stack([(now[0] - bank[0]).square() / scale, ((now[1] - bank[1]) / scale).square()])
    channels = torch.bincount(layers)
    each = errors.new_zeros(2, len(scale), len(channels)).index_add(2, layers, errors) / channels
    weight = torch.ones_like(channels, dtype=errors.dtype)
    weight[0] = first
    # not `@ weight`: under autocast a product is taken in half precision
    return ((each + 1e-8).sqrt().sum(0) * weight).sum(1) / weight.sum()
