"""A small residual network in the place of CLIP's image encoder, for images of about 64 pixels; not from the paper.

A transformer needs more images and time than a demonstration has to learn what an edge is. This one is the same that
`deeplab` has as ``tiny_resnet``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from perdure.networks.clip.encoder import EncoderOutput, MapsEncoder
from perdure.networks.deeplab import tiny_resnet

CHANNELS = (16, 24, 32, 48)
MOMENTUM = 0.1
"""Of running statistics, which start from nothing."""


class TinyMapsEncoder(MapsEncoder):
    """The maps of the last three of four residual stages, and a projection of the deepest into the joint space.

    Starts from random weights.

    Args:
        dim: Length of vectors in the joint space.
        stride: Input pixels per cell of all maps: 4, 8 or 16.
        in_channels: Channels of the images.
        channels: Of the four stages.

    Raises:
        UsageError: The stride or the channels are not possible.
    """

    def __init__(self, dim: int, stride: int = 4, *, in_channels: int = 3, channels: Sequence[int] = CHANNELS) -> None:
        super().__init__(channels[1:], dim, stride)
        trunk, _ = tiny_resnet(in_channels, stride, channels)
        net: Any = trunk
        self.stem = nn.Sequential(net.conv1, net.bn1, net.act1, net.layer1)
        self.stages = nn.ModuleList([net.layer2, net.layer3, net.layer4])
        self.project = nn.Linear(channels[-1], dim, bias=False)
        nn.init.trunc_normal_(self.project.weight, std=channels[-1] ** -0.5)
        for part in (self.stem, self.stages):
            for norm in part.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.momentum = MOMENTUM

    def forward(self, images: Tensor) -> EncoderOutput:
        """Encode images ``(B, C, H, W)`` whose sides are multiples of the stride."""
        features, maps = self.stem(images), []
        for stage in self.stages:
            features = stage(features)
            maps.append(features)
        small = [
            F.interpolate(one, maps[-1].shape[2:], mode="area") if one.shape != maps[-1].shape else one for one in maps
        ]
        joint = self.project(maps[-1].float().movedim(1, -1)).float()
        cls = F.normalize(joint.mean((1, 2)), dim=-1)
        return EncoderOutput(tuple(small), cls, F.normalize(joint, dim=-1).movedim(-1, 1))

    def blocks(self) -> list[nn.Module]:
        """The stem and the stages behind it."""
        return [self.stem, *self.stages]

    def after_blocks(self) -> list[nn.Module]:
        """The projection."""
        return [self.project]
