"""A small residual U-Net for images and volumes, with features at full resolution."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from perdure.errors import UsageError
from perdure.networks.layers import batch_norms, init_kaiming
from perdure.networks.segmenter import Segmenter

Norm = Literal["instance", "batch", "group"]


def residual_unet(
    dims: int,
    in_channels: int = 1,
    widths: Sequence[int] = (16, 32, 64, 128),
    *,
    norm: Norm = "instance",
    strides: Sequence[int | Sequence[int]] | None = None,
) -> Segmenter:
    """Build a residual U-Net without classifiers; its features have stride 1 and ``widths[0]`` channels.

    All of it is the ``backbone`` group: nothing in it is pretrained.

    Args:
        dims: 2 or 3.
        in_channels: Channels of the images.
        widths: Channels per level, from full resolution down.
        norm: ``instance`` (no statistics, any batch size), ``batch``, or ``group`` (up to eight groups).
        strides: One per step between levels, so one fewer than ``widths``: a number, or one number per axis for
            anisotropic voxels, such as ``[[1, 2, 2], [2, 2, 2]]``. Not given: 2 everywhere.

    Raises:
        UsageError: An option or the combination of options cannot be built.
    """
    if dims not in (2, 3):
        raise UsageError(f"residual_unet has 2 or 3 dimensions, not {dims}", "set dims to 2 or 3")
    if norm not in ("instance", "batch", "group"):
        raise UsageError(f"unknown norm '{norm}'", "known: batch, group, instance")
    if not widths or min(widths) < 1 or in_channels < 1:
        raise UsageError(
            f"residual_unet: widths {list(widths)} and in_channels {in_channels} must be positive", "correct them"
        )
    given = [2] * (len(widths) - 1) if strides is None else list(strides)
    steps = [(step,) * dims if isinstance(step, int) else tuple(step) for step in given]
    if len(steps) != len(widths) - 1 or any(len(step) != dims or min(step) < 1 for step in steps):
        raise UsageError(
            f"residual_unet: strides {given} do not fit {len(widths)} levels in {dims}D",
            f"give {len(widths) - 1} positive strides, each a number or {dims} numbers",
        )
    body = UNetBody(dims, in_channels, widths, steps, norm)
    total = [math.prod(step[axis] for step in steps) for axis in range(dims)]
    return Segmenter(body, widths[0], 1, dims, multiple=total, in_channels=in_channels)


class UNetBody(nn.Module):
    """Encoder of residual blocks, decoder of transposed convolutions and residual blocks.

    Args:
        dims: 2 or 3.
        in_channels: Channels of the images.
        widths: Channels per level.
        steps: Strides from each level to the next, one number per axis.
        norm: Kind of normalisation.
    """

    def __init__(
        self, dims: int, in_channels: int, widths: Sequence[int], steps: Sequence[tuple[int, ...]], norm: Norm
    ) -> None:
        super().__init__()
        self.norm, self.steps = norm, steps
        pairs = list(zip(widths[:-1], widths[1:], steps, strict=True))
        self.stem = ResidualBlock(dims, in_channels, widths[0], (1,) * dims, norm)
        self.down = nn.ModuleList(ResidualBlock(dims, fine, coarse, step, norm) for fine, coarse, step in pairs)
        # Kernel = stride: every output cell has exactly one tap, so that no checkerboard pattern arises.
        # torch's types ask for as many numbers as there are axes, which is known only when the network is built
        transposed: Callable[..., nn.Module] = nn.ConvTranspose2d if dims == 2 else nn.ConvTranspose3d
        self.up = nn.ModuleList(transposed(coarse, fine, step, step) for fine, coarse, step in reversed(pairs))
        self.merge = nn.ModuleList(
            ResidualBlock(dims, 2 * fine, fine, (1,) * dims, norm) for fine, _, _ in reversed(pairs)
        )
        init_kaiming(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(N, C, *S)`` -> features ``(N, widths[0], *S)``, not negative.

        Raises:
            UsageError: The coarsest level is a single cell, which cannot be normalised.
        """
        levels = [self.stem(images)]
        for number, (block, step) in enumerate(zip(self.down, self.steps, strict=True), 1):
            # Normalisation over one value per channel is an error in torch; say what to do about it.
            cells = math.prod(side // stride for side, stride in zip(levels[-1].shape[2:], step, strict=True))
            batch_trains = any(part.training for part in batch_norms(block))
            if (self.norm == "instance" and cells == 1) or (batch_trains and cells * len(images) == 1):
                raise UsageError(
                    f"input too small: level {number} of the U-Net would be one cell, with no spread to normalise",
                    "use larger crops, fewer widths, smaller strides or norm: group",
                )
            levels.append(block(levels[-1]))
        x: Tensor = levels.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([levels.pop(), up(x)], 1))
        return x


class ResidualBlock(nn.Module):
    """Two 3-wide convolutions with normalisation, a shortcut, ReLU.

    Args:
        dims: 2 or 3.
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        step: Stride of the first convolution, one number per axis.
        norm: Kind of normalisation.
    """

    def __init__(self, dims: int, in_channels: int, out_channels: int, step: tuple[int, ...], norm: Norm) -> None:
        super().__init__()
        conv: Callable[..., nn.Module] = nn.Conv2d if dims == 2 else nn.Conv3d
        self.conv1 = conv(in_channels, out_channels, 3, step, 1, bias=False)
        self.norm1 = _norm(norm, dims, out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = _norm(norm, dims, out_channels)
        self.act = nn.ReLU(inplace=True)
        same = in_channels == out_channels and set(step) == {1}
        # A shortcut whose kernel is its stride sees every voxel; a 1-wide one would skip most of them.
        self.shortcut: nn.Module = (
            nn.Identity()
            if same
            else nn.Sequential(
                conv(in_channels, out_channels, step, step, bias=False),
                _norm(norm, dims, out_channels),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, *s)`` -> ``(N, out_channels, *(s / step))``."""
        out = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        result: Tensor = self.act(out + self.shortcut(x))
        return result


def _norm(kind: Norm, dims: int, channels: int) -> nn.Module:
    if kind == "group":
        groups = math.gcd(8, channels)
        # A group of one channel would be instance normalisation.
        return nn.GroupNorm(groups if groups < channels else max(groups // 2, 1), channels)
    if kind == "batch":
        return nn.BatchNorm2d(channels) if dims == 2 else nn.BatchNorm3d(channels)
    return nn.InstanceNorm2d(channels, affine=True) if dims == 2 else nn.InstanceNorm3d(channels, affine=True)
