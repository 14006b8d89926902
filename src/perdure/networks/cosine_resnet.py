"""The small and the large residual net of CCSI, for whole images (spec CCSI 2.1)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, Literal, NamedTuple

from torch import Tensor, nn

from perdure.errors import UsageError
from perdure.networks.classifier import Classifier
from perdure.networks.continual_norm import ContinualNorm, check_momentum
from perdure.networks.layers import init_kaiming

Size = Literal["small", "large"]
Norm = Literal["batch", "continual"]
WINDOW: Final = 7
STEM: Final = 16


class Plan(NamedTuple):
    """One published size.

    Args:
        widths: Channels of each stage.
        blocks: Residual blocks per stage.
        stride: Of the first block of each stage.
        side: Of the images it was published for, in pixels.
        final_relu: Whether it keeps the ReLU after the last block.
    """

    widths: tuple[int, ...]
    blocks: int
    stride: int
    side: int
    final_relu: bool


PLANS: Final[dict[Size, Plan]] = {
    "small": Plan((16, 32, 64), 1, 1, 32, True),
    "large": Plan((16, 32, 64, 128), 2, 2, 224, False),
}


def cosine_resnet(
    in_channels: int = 3,
    *,
    size: Size = "small",
    norm: Norm = "continual",
    norm_groups: int = 4,
    norm_momentum: float = 0.1,
    final_relu: bool | None = None,
    side: int | None = None,
    group_statistics: bool = False,
) -> Classifier:
    """Build a residual net without classes. Defaults: 77,905 parameters with two classes of colour images.

    Args:
        in_channels: Channels of the images.
        size: ``small`` for images of 32 pixels, ``large`` for images of 224.
        norm: ``continual`` (CCSI: group, then batch normalisation) or ``batch`` (the conference method).
        norm_groups: Groups of ``norm: continual``; 8 and 16 are the published alternatives.
        norm_momentum: Share of the newest batch in the running statistics; the published code of CCSI has 1.
        final_relu: Keep the ReLU after the last block, so that no feature is negative. Not given: as published,
            kept in the small net and dropped in the large one.
        side: Of the square images, in pixels; decides the length of the features. Not given: 32 or 224. Sides that
            pool to the same number of cells work with one network: 27 to 40 with 32.
        group_statistics: Keep the moments of each image of a training batch, see ``ContinualNorm``; they come from
            single images, and the ledger must say so.

    Raises:
        UsageError: An option or the combination of options cannot be built.
    """
    plan = PLANS[size]
    side = plan.side if side is None else side
    if in_channels < 1:
        raise UsageError(f"cosine_resnet: {in_channels} channels make no image", "give 1 or more")
    if norm == "batch" and group_statistics:
        raise UsageError("group statistics need continual normalisation", "set norm: continual, or leave them out")
    check_momentum(norm_momentum)
    shrink = 2 * int(plan.stride ** len(plan.widths))  # input pixels per cell of the last map; the stem halves too
    cells = -(-side // shrink) // WINDOW
    if cells < 1:
        least = (WINDOW - 1) * shrink + 1
        raise UsageError(f"cosine_resnet size {size}: images of {side} pixels are too small", f"use {least} or more")
    make: Callable[[int], nn.Module] = (
        partial(ContinualNorm, groups=norm_groups, momentum=norm_momentum, group_statistics=group_statistics)
        if norm == "continual"
        else partial(nn.BatchNorm2d, momentum=norm_momentum)
    )
    body = ResNetBody(in_channels, plan, make, plan.final_relu if final_relu is None else final_relu)
    # every side whose last map has the same number of whole windows
    sides = range((cells * WINDOW - 1) * shrink + 1, (cells * WINDOW + WINDOW - 1) * shrink + 1)
    return Classifier(body, plan.widths[-1] * cells**2, in_channels=in_channels, sides=sides)


class ResNetBody(nn.Module):
    """Stem of stride 2, stages of residual blocks, 7x7 averages, flattened.

    Args:
        in_channels: Channels of the images.
        plan: The published size.
        norm: Makes the normalisation of a number of channels.
        final_relu: Whether the last block ends with a ReLU.
    """

    def __init__(self, in_channels: int, plan: Plan, norm: Callable[[int], nn.Module], final_relu: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, STEM, 3, 2, 1, bias=False), norm(STEM), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential()
        widths = [width for width in plan.widths for _ in range(plan.blocks)]
        for number, (channels, width) in enumerate(zip([STEM, *widths], widths, strict=False)):
            stride = plan.stride if number % plan.blocks == 0 else 1
            relu = final_relu or number < len(widths) - 1
            self.blocks.append(BasicBlock(channels, width, stride, norm, relu))
        # As published, windows of 7x7 and not one average of the whole map: larger images give longer features.
        self.pool = nn.AvgPool2d(WINDOW)  # rows and columns beyond the last whole window are dropped
        init_kaiming(self, "fan_out")

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` -> features ``(N, d)``: all cells of channel 0, then of channel 1, and so on."""
        features: Tensor = self.pool(self.blocks(self.stem(images)))
        return features.flatten(1)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with normalisation, a shortcut, ReLU.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Of the first convolution.
        norm: Makes the normalisation of a number of channels.
        final_relu: Whether a ReLU follows the sum.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        norm: Callable[[int], nn.Module],
        final_relu: bool = True,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = norm(out_channels)
        self.act = nn.ReLU(inplace=True)
        same = in_channels == out_channels and stride == 1
        self.skip: nn.Module = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm(out_channels))
        )
        self.final_relu = final_relu

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` -> ``(N, out_channels, H / stride, W / stride)``."""
        out: Tensor = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        out = out + self.skip(x)
        return self.act(out) if self.final_relu else out
