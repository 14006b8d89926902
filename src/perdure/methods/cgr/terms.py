"""The segmenter's loss, and the rotation of its training images (spec CGR 5.3, 5.4)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

DEGREES = 30.0
"""Largest angle by which a training image is turned."""


def soft_dice(logits: Tensor, channels: Tensor, absent: Literal["count", "ignore"] = "count") -> Tensor:
    """Soft Dice loss of the softmax, background included: mean over images and classes.

    ``1 − (2 Σ p g + ε) / (Σ p + Σ g + ε)`` with ε = 1e-5. With ``count`` a class that an image does not show adds
    almost 1 until its probability is gone from the whole image, as published; with ``ignore`` it is left out.

    Args:
        logits: ``(N, K, *S)``.
        channels: ``(N, *S)`` int64, 0 to K − 1; pixels below 0 do not count.
        absent: What a class counts that an image does not show.

    Returns:
        Scalar float32.
    """
    valid = (channels >= 0).unsqueeze(1)
    p = (logits.float().softmax(1) * valid).flatten(2)
    truth = F.one_hot(channels.clamp_min(0), logits.shape[1]).movedim(-1, 1)
    g = (truth * valid).flatten(2).float()
    dice = 1.0 - (2.0 * (p * g).sum(2) + 1e-5) / (p.sum(2) + g.sum(2) + 1e-5)
    if absent == "count":
        return dice.mean()
    shown = g.any(2)
    return (dice * shown).sum() / shown.sum().clamp_min(1)


def cross_entropy(logits: Tensor, channels: Tensor) -> Tensor:
    """Mean over the pixels that count (``channels`` of 0 or more); 0 where there are none."""
    loss = F.cross_entropy(logits.float(), channels, ignore_index=-1, reduction="sum")
    return loss / (channels >= 0).sum().clamp_min(1)


def standardised(images: Tensor) -> Tensor:
    """Each image ``(N, C, *S)`` with mean 0 and deviation 1 over all of its channels together."""
    flat = images.float().flatten(1)
    shape = (-1, *[1] * (images.ndim - 1))
    return (images.float() - flat.mean(1).view(shape)) / flat.std(1).clamp_min(1e-6).view(shape)


def rotated(images: Tensor, labels: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """Turn each image ``(N, C, H, W)`` and its label map ``(N, H, W)`` with a probability, by up to 30 degrees.

    Images linearly, with their edge repeated; labels by the nearest pixel, with 0 outside, so that no label comes up
    that was not there. Draws from torch's generator on the CPU.
    """
    if not probability:
        return images, labels
    angle = torch.deg2rad((2.0 * torch.rand(len(images)) - 1.0) * DEGREES) * (torch.rand(len(images)) < probability)
    if not bool(angle.any()):
        return images, labels
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # square images: coordinates run from -1 to 1 along both axes, so a longer side would need a factor
    height, width = images.shape[2:]
    turn = torch.stack([cos, -sin * height / width, zero, sin * width / height, cos, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(turn.to(images.device), [len(images), 1, height, width], align_corners=False)
    turned = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    found = F.grid_sample(labels[:, None].float(), grid, mode="nearest", align_corners=False)
    return turned, found[:, 0].long()
