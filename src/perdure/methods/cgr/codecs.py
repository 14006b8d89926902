"""Masks and images as the generator sees them, from -1 to 1, and back (spec CGR 2.6). Pure functions.

A mask has one channel with local codes: 0 background, then the classes that the task annotates, in learning order.
Equal grey values mean different structures in different tasks; the prompt tells them apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.labels import BACKGROUND
from perdure.methods.losses import channels_of

VERSION = 1
"""Of the coding: stored pairs say with which one they were made."""
Ends = tuple[Sequence[float], Sequence[float]]


def to_local(labels: Tensor, ids: Sequence[int]) -> Tensor:
    """Global ids to local codes: place in ``ids`` + 1. Everything else, ignored pixels included, is background."""
    return channels_of(labels, ids) + 1


def to_global(codes: Tensor, ids: Sequence[int]) -> Tensor:
    """Local codes to global ids, int64."""
    return torch.tensor((BACKGROUND, *ids), device=codes.device)[codes.long()]


def encode_mask(codes: Tensor, classes: int) -> Tensor:
    """Codes ``(N, H, W)`` of 0..classes -> ``(N, 1, H, W)``: ``2 l / classes − 1``."""
    return (codes.float() * (2.0 / classes) - 1.0)[:, None]


def decode_mask(values: Tensor, classes: int) -> Tensor:
    """The nearest code of each value, ``(N, 1, H, W)`` -> ``(N, H, W)`` int64."""
    return ((values[:, 0].float() + 1.0) * (classes / 2.0)).round().clamp(0, classes).long()


def encode_image(images: Tensor, ends: Ends) -> Tensor:
    """Prepared images ``(N, C, H, W)`` -> black −1, white 1; values beyond are cut."""
    black, white = _channels(images, ends)
    return (2.0 * (images.float() - black) / (white - black) - 1.0).clamp(-1.0, 1.0)


def to_bytes(values: Tensor) -> Tensor:
    """Values of −1 to 1 as uint8, rounded."""
    return (127.5 * (values.float() + 1.0)).round().clamp(0, 255).to(torch.uint8)


def from_bytes(stored: Tensor, ends: Ends) -> Tensor:
    """Stored images ``(..., C, H, W)`` uint8 as prepared ones, float32."""
    black, white = _channels(stored, ends)
    return black + (white - black) * (stored.float() / 255.0)


def stretched(values: Tensor) -> Tensor:
    """Each sample ``(N, ...)`` stretched to [−1, 1]; a constant one becomes its value (published defect, Q11 and Q20).

    Masks so coded lose what a value means: an empty mask becomes 0, the code of the middle class.
    """
    flat = values.float().flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    shape = (-1, *[1] * (values.ndim - 1))
    low, span = low.view(shape), (high - low).view(shape)
    return torch.where(span > 0, 2.0 * (values.float() - low) / span.clamp_min(1e-12) - 1.0, -values.float())


def majority(codes: Tensor, classes: int) -> Tensor:
    """Each code ``(N, H, W)`` replaced by the most frequent one of its 3 × 3 pixels; its own stays in a tie."""
    one_hot = F.one_hot(codes.long(), classes + 1).movedim(-1, 1).float()
    votes = F.avg_pool2d(F.pad(one_hot, (1, 1, 1, 1), mode="replicate"), 3, 1) * 9.0
    return (votes + 0.5 * one_hot).argmax(1)


def subsets(codes: Tensor, classes: int) -> Tensor:
    """Which classes each mask ``(N, H, W)`` shows, ``(N,)`` int64: bit ``l − 1`` stands for code ``l``."""
    shown = torch.stack([(codes == code).flatten(1).any(1) for code in range(1, classes + 1)], 1)
    return (shown.long() << torch.arange(classes, device=codes.device)).sum(1)


def members(subset: int) -> tuple[int, ...]:
    """The codes of a subset: 5 -> (1, 3)."""
    return tuple(code + 1 for code in range(subset.bit_length()) if subset >> code & 1)


def _channels(images: Tensor, ends: Ends) -> tuple[Tensor, Tensor]:
    black, white = (torch.tensor(end, device=images.device).view(-1, 1, 1) for end in ends)
    return black, white
