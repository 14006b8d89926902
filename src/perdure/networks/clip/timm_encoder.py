"""A pretrained convolutional network in the place of CLIP's image encoder; not from the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from perdure.errors import UsageError
from perdure.networks.clip.encoder import EncoderOutput, MapsEncoder
from perdure.networks.deeplab import timm_knows
from perdure.networks.segmenter import upsample
from perdure.networks.weights import Weights, load_backbone_weights

STRIDES = (8, 16, 32)
LEVELS = 3


class TimmMapsEncoder(MapsEncoder):
    """The three deepest feature maps of a timm backbone, and a linear projection of the deepest into the joint space.

    The projection starts from random weights, so before training its vectors tell nothing about any text. What the
    decoder works on, the maps, are real features where the weights are pretrained.

    Args:
        backbone: A convolutional timm backbone, such as ``tf_efficientnet_lite0``.
        dim: Length of vectors in the joint space.
        stride: Input pixels per cell of all maps; deeper ones are upsampled to it, shallower ones averaged.
        in_channels: Channels of the images.
        weights: Of the backbone: ``random``, ``installed``, ``imagenet`` or a file, see ``load_backbone_weights``.

    Raises:
        UsageError: There is no such backbone, or it cannot be used this way.
        DataError: The weights do not fit.
    """

    def __init__(
        self, backbone: str, dim: int, stride: int = 16, *, in_channels: int = 3, weights: str | Path = "random"
    ) -> None:
        import timm

        timm_knows(backbone)
        if stride not in STRIDES:
            raise UsageError(f"stride {stride} is not possible with {backbone}", "use one of 8, 16, 32")
        try:
            # stride 32 inside, whatever the maps' own: dilated depthwise convolutions are slow on a CPU
            net: Any = timm.create_model(backbone, features_only=True, in_chans=in_channels)
        except (TypeError, AssertionError, RuntimeError, ValueError) as error:
            raise UsageError(
                f"backbone '{backbone}' gives no feature maps", "use for example tf_efficientnet_lite0 or resnet18"
            ) from error
        reductions = net.feature_info.reduction()
        if len(reductions) < LEVELS or reductions[-1] != 32:
            raise UsageError(
                f"backbone '{backbone}' has maps of strides {reductions}, not of 8, 16 and 32",
                "use for example tf_efficientnet_lite0 or resnet18",
            )
        widths = net.feature_info.channels()[-LEVELS:]
        super().__init__(widths, dim, 32, fresh=("project",))
        self.cell = stride
        self.backbone: nn.Module = net
        self.project = nn.Linear(widths[-1], dim, bias=False)
        nn.init.trunc_normal_(self.project.weight, std=widths[-1] ** -0.5)
        self.weights: Weights = load_backbone_weights(net, weights)

    def forward(self, images: Tensor) -> EncoderOutput:
        """Encode images ``(B, C, H, W)`` whose sides are multiples of 32."""
        grid = (images.shape[2] // self.cell, images.shape[3] // self.cell)
        levels: list[Tensor] = self.backbone(images)[-LEVELS:]
        deepest = levels[-1].float().movedim(1, -1)
        joint = self.project(deepest).float()
        cls = F.normalize(joint.mean((1, 2)), dim=-1)
        dense = F.normalize(_resized(joint.movedim(-1, 1), grid), dim=1)
        return EncoderOutput(tuple(_resized(level, grid) for level in levels), cls, dense)

    def blocks(self) -> list[nn.Module]:
        """The backbone's direct parts that hold parameters, from the stem on; stages of a list one by one."""
        parts: list[nn.Module] = []
        for part in self.backbone.children():
            stages = list(part) if isinstance(part, (nn.ModuleList, nn.Sequential)) else [part]
            parts += [stage for stage in stages if any(True for _ in stage.parameters())]
        return parts

    def after_blocks(self) -> list[nn.Module]:
        """The projection."""
        return [self.project]


def _resized(level: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map with the cells of ``grid``: averaged where it has more, linear where it has fewer."""
    if level.shape[2] > grid[0]:
        return F.adaptive_avg_pool2d(level, grid)
    return upsample(level, grid)
