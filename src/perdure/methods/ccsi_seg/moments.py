"""The moment bank: mean and variance of every convolution's output, over all cells and under each class (spec 8.3).

Taken before normalisation, so it serves networks whose normalisation has no running statistics as well. Channels of
all convolutions lie side by side: T channels of L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.methods.ccsi_seg.terms import hot
from perdure.networks.layers import CONVOLUTIONS

SLIGHT: Final = 1e-4
"""Added to variances before they divide."""
MASK_PIXELS: Final = 1 << 24
"""Pixels of masks that exist at a time (at least those of one image)."""


@contextmanager
def tapped(body: nn.Module) -> Iterator[list[Tensor]]:
    """Hand out a list that collects what the convolutions of ``body`` return, in the order in which they run."""
    maps: list[Tensor] = []

    def note(_: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> None:
        maps.append(out)

    hooks = [m.register_forward_hook(note) for m in body.modules() if isinstance(m, CONVOLUTIONS)]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


class Sums(NamedTuple):
    """Weighted sums under R masks: weight ``(R, L)``, values and squares ``(R, T)``."""

    weight: Tensor
    values: Tensor
    squares: Tensor


def moment_sums(maps: Sequence[Tensor], masks: Tensor) -> Sums:
    """Sums of feature maps under masks; a cell counts by the share of it that the mask covers.

    Args:
        maps: Of each layer ``(N, c, h, w)``.
        masks: ``(N, R, H, W)``, in the number format of the sums.
    """
    resized: dict[torch.Size, Tensor] = {}
    weight, values, squares = [], [], []
    for found in maps:
        size = found.shape[2:]
        if size not in resized:
            resized[size] = F.adaptive_avg_pool2d(masks, (size[0], size[1])).transpose(0, 1).flatten(1)
        mask = resized[size]
        cells = found.to(masks.dtype).movedim(1, -1).flatten(0, -2)
        weight.append(mask.sum(1))
        values.append(mask @ cells)
        squares.append(mask @ cells.square())
    return Sums(torch.stack(weight, 1), torch.cat(values, 1), torch.cat(squares, 1))


def label_sums(maps: Sequence[Tensor], rows: Tensor, counts: Tensor, classes: int) -> Sums:
    """Sums, in float64, over the cells that count and over those of each class: R = 1 + K masks.

    Args:
        maps: Of each layer ``(N, c, h, w)``.
        rows: Class of each pixel ``(N, H, W)``, −1 for none.
        counts: ``(N, H, W)`` bool.
        classes: K.
    """
    images = max(1, MASK_PIXELS // ((1 + classes) * rows[0].numel()))
    found: list[Sums] = []
    for first in range(0, len(rows), images):
        here = slice(first, first + images)
        masks = torch.cat([counts[here, None].float(), hot(rows[here], classes)], 1)
        found.append(moment_sums([m[here] for m in maps], masks.double()))
    return Sums(*(torch.stack(parts).sum(0) for parts in zip(*found, strict=True)))


def layer_of(maps: Sequence[Tensor]) -> Tensor:
    """Layer of each of the T channels ``(T,)`` int64."""
    counts = torch.tensor([found.shape[1] for found in maps])
    return torch.repeat_interleave(counts).to(maps[0].device)


def moments(sums: Sums, layers: Tensor) -> Tensor:
    """Mean and variance ``(2, R, T)``; zeros under a mask without weight."""
    weight = sums.weight[:, layers].clamp_min(1e-6)
    mean = sums.values / weight
    return torch.stack([mean, (sums.squares / weight - mean.square()).clamp_min(0.0)])


def moment_loss(now: Tensor, bank: Tensor, layers: Tensor, first: float) -> Tensor:
    """How far moments are from the bank, a mask: mean over layers of the relative error of means and of variances.

    The error of a mean is in units of the bank's deviation, that of a variance in units of the bank's variance; over
    the channels of a layer they are taken together as a root mean square (8.3, relative error a channel).

    Args:
        now: ``(2, R, T)``.
        bank: ``(2, R, T)``.
        layers: Layer of each channel ``(T,)``.
        first: Weight of the first layer; the others weigh 1.

    Returns:
        ``(R,)``.
    """
    scale = bank[1] + SLIGHT
    errors = torch.stack([(now[0] - bank[0]).square() / scale, ((now[1] - bank[1]) / scale).square()])
    count = int(layers[-1]) + 1
    channels = torch.bincount(layers, minlength=count)
    each = errors.new_zeros(2, len(scale), count).index_add(2, layers, errors) / channels
    weight = torch.ones_like(channels, dtype=errors.dtype)
    weight[0] = first
    return (each + 1e-8).sqrt().sum(0) @ weight / weight.sum()
