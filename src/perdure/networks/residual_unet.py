"""A small residual U-Net for images and volumes, with features at full resolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from perdure.errors import UsageError
from perdure.networks.layers import init_kaiming
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
        widths: Channels a level, from full resolution down.
        norm: ``instance`` (no statistics, any batch size), ``batch``, or ``group`` (up to eight groups).
        strides: One a step between levels, so one fewer than ``widths``: a number, or one number an axis for
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
    steps = _steps(dims, len(widths) - 1, strides)
    body = UNetBody(dims, in_channels, widths, steps, norm)
    total = [math.prod(step[axis] for step in steps) for axis in range(dims)]
    return Segmenter(body, widths[0], 1, dims, multiple=total, in_channels=in_channels)


class UNetBody(nn.Module):
    """Encoder of residual blocks, decoder of transposed convolutions and residual blocks.

    Args:
        dims: 2 or 3.
        in_channels: Channels of the images.
        widths: Channels a level.
        steps: Strides from each level to the next, one number an axis.
        norm: Kind of normalisation.
    """

    def __init__(
        self, dims: int, in_channels: int, widths: Sequence[int], steps: Sequence[tuple[int, ...]], norm: Norm
    ) -> None:
        super().__init__()
        self.norm = norm
        pairs = list(zip(widths[:-1], widths[1:], steps, strict=True))
        self.stem = ResidualBlock(dims, in_channels, widths[0], (1,) * dims, norm)
        self.down = nn.ModuleList(ResidualBlock(dims, fine, coarse, step, norm) for fine, coarse, step in pairs)
        transposed = nn.ConvTranspose2d if dims == 2 else nn.ConvTranspose3d
        self.up = nn.ModuleList(transposed(coarse, fine, step, step) for fine, coarse, step in reversed(pairs))  # type: ignore[arg-type]
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
        for number, block in enumerate(self.down):
            self._check_cells(levels[-1], number)
            levels.append(block(levels[-1]))
        x: Tensor = levels.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([levels.pop(), up(x)], 1))
        return x

    def _check_cells(self, x: Tensor, number: int) -> None:
        """Normalisation over one value a channel is an error in torch; say what to do about it."""
        block = self.down[number]
        assert isinstance(block, ResidualBlock)
        cells = math.prod(side // step for side, step in zip(x.shape[2:], block.step, strict=True))
        values = cells * x.shape[0] if self.norm == "batch" else cells
        batch_trains = any(
            part.training for part in block.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)
        )
        if values == 1 and (self.norm == "instance" or (self.norm == "batch" and batch_trains)):
            raise UsageError(
                f"input too small: level {number + 1} of the U-Net would be one cell, with no spread to normalise",
                "use larger crops, fewer widths, smaller strides or norm: group",
            )


class ResidualBlock(nn.Module):
    """Two 3-wide convolutions with normalisation, a shortcut, ReLU.

    Args:
        dims: 2 or 3.
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        step: Stride of the first convolution, one number an axis.
        norm: Kind of normalisation.
    """

    def __init__(self, dims: int, in_channels: int, out_channels: int, step: tuple[int, ...], norm: Norm) -> None:
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        self.step = step
        self.conv1 = conv(in_channels, out_channels, 3, step, 1, bias=False)  # type: ignore[arg-type]
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
                conv(in_channels, out_channels, step, step, bias=False),  # type: ignore[arg-type]
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


def _steps(dims: int, count: int, strides: Sequence[int | Sequence[int]] | None) -> list[tuple[int, ...]]:
    given = [2] * count if strides is None else list(strides)
    steps = [(step,) * dims if isinstance(step, int) else tuple(step) for step in given]
    if len(steps) != count or any(len(step) != dims or min(step) < 1 for step in steps):
        raise UsageError(
            f"residual_unet: strides {given} do not fit {count + 1} levels in {dims}D",
            f"give {count} positive strides, each a number or {dims} numbers",
        )
    return steps
