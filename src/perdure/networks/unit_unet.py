"""The 2D residual U-Net of CGR: residual units with PReLU and no activation after the sum (spec CGR 5.1).

:mod:`perdure.networks.residual_unet` differs: its blocks end in ReLU, its normalisation has scale and shift, it halves
within blocks and has no unit below the coarsest level. The published parameter counts belong to this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from perdure.errors import UsageError
from perdure.networks.segmenter import Segmenter


def unit_unet(in_channels: int = 3, widths: Sequence[int] = (32, 64, 128, 256, 512)) -> Segmenter:
    """Build the network without classifiers; its features have stride 1 and ``widths[0]`` channels.

    Args:
        in_channels: Channels of the images.
        widths: Channels per level, from full resolution down; the defaults are the published ones.

    Raises:
        UsageError: A width or the number of channels is below 1, or there are fewer than two levels.
    """
    if len(widths) < 2 or min(widths) < 1 or in_channels < 1:
        raise UsageError(
            f"unit_unet: widths {list(widths)} and in_channels {in_channels} cannot be built", "correct them"
        )
    side = 2 ** (len(widths) - 1)
    return Segmenter(UnitBody(in_channels, widths), widths[0], 1, 2, multiple=(side, side), in_channels=in_channels)


class UnitBody(nn.Module):
    """Encoder and decoder of residual units.

    Args:
        in_channels: Channels of the images.
        widths: Channels per level.
    """

    def __init__(self, in_channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Unit(a, b, 2) for a, b in pairwise((in_channels, *widths)))
        self.down = nn.ModuleList(nn.Conv2d(width, width, 1, stride=2) for width in widths[:-1])
        self.centre = Unit(widths[-1], widths[-2], 2)
        # from the coarsest level up: what comes in has the width of the level, and leaves with that of the next
        levels = list(reversed(widths[:-1]))
        outs = (*levels[1:], widths[0])
        self.up = nn.ModuleList(nn.ConvTranspose2d(w, w, 3, stride=2, padding=1, output_padding=1) for w in levels)
        self.decoder = nn.ModuleList(Unit(2 * w, out, 1) for w, out in zip(levels, outs, strict=True))

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` -> features ``(N, widths[0], H, W)``.

        Raises:
            UsageError: The coarsest level is a single cell, which cannot be normalised.
        """
        if self.training and max(images.shape[2:]) >> len(self.down) < 2:
            raise UsageError(
                "input too small: the coarsest level of the U-Net would be one cell, with no spread to normalise",
                f"use images of {2 << len(self.down)} pixels or more, or fewer widths",
            )
        levels: list[Tensor] = []
        x = images
        for unit, down in zip(self.encoder, (*self.down, nn.Identity()), strict=True):
            x = unit(x)
            levels.append(x)
            x = down(x)
        levels.pop()  # the coarsest one is what the unit in the middle works on
        features: Tensor = self.centre(x)
        for up, unit in zip(self.up, self.decoder, strict=True):
            features = unit(torch.cat([up(features), levels.pop()], 1))
        return features


class Unit(nn.Module):
    """Convolutions with instance normalisation and PReLU, plus a 1×1 shortcut; nothing after the sum.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        convolutions: How many there are.
    """

    def __init__(self, in_channels: int, out_channels: int, convolutions: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (in_channels, *[out_channels] * (convolutions - 1)):
            layers += [nn.Conv2d(inputs, out_channels, 3, padding=1), nn.InstanceNorm2d(out_channels), nn.PReLU()]
        self.layers = nn.Sequential(*layers)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, h, w)`` -> ``(N, out_channels, h, w)``."""
        result: Tensor = self.layers(x) + self.shortcut(x)
        return result
