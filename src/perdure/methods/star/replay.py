"""Replayed features: noisy vectors around the prototypes of old classes (spec 4.2)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def draw(prototypes: Tensor, spreads: Tensor, norms: Tensor, rows: Tensor, per_channel: bool = False) -> Tensor:
    """Features ``x = (p + e * spread) s`` with ``e ~ N(0, 1)`` a channel and ``s ~ N(mean, std^2)``.

    Neither renormalised after the noise nor clamped to be positive, as published. Uses torch's generator.

    Args:
        prototypes: ``(C, D)`` unit vectors.
        spreads: ``(C, D)`` standard deviation of each channel around the prototype.
        norms: ``(C, 2)`` mean and standard deviation of the features' norms.
        rows: ``(K,)`` class row of each vector.
        per_channel: Draw ``s`` for each channel instead of each vector, as in the published code (Q3).

    Returns:
        ``(K, D)``.
    """
    count, width = len(rows), prototypes.shape[1]
    mean, std = norms[rows].unbind(1)
    noise = torch.randn(count, width, dtype=prototypes.dtype, device=prototypes.device)
    size = torch.randn(count, width if per_channel else 1, dtype=prototypes.dtype, device=prototypes.device)
    size = torch.addcmul(mean[:, None], size, std[:, None])
    return torch.addcmul(prototypes[rows], noise, spreads[rows]).mul_(size)


def chunks(
    prototypes: Tensor, spreads: Tensor, norms: Tensor, numbers: Tensor, size: int, per_channel: bool = False
) -> Iterator[Tensor]:
    """Draw ``numbers[c]`` features of each class ``c``, at most ``size`` at a time: ``(<= size, D)`` each.

    Args:
        prototypes: See :func:`draw`; so are ``spreads``, ``norms`` and ``per_channel``.
        spreads: ``(C, D)``.
        norms: ``(C, 2)``.
        numbers: ``(C,)`` int64.
        size: Vectors a chunk.
        per_channel: See :func:`draw`.
    """
    rows = torch.repeat_interleave(numbers)
    for part in torch.split(rows, size):
        if len(part):
            yield draw(prototypes, spreads, norms, part, per_channel)
