"""DeepLabV3: a dilated classification backbone and atrous spatial pyramid pooling (spec STAR section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perdure.errors import UsageError, nearest
from perdure.networks.layers import batch_norms, init_kaiming
from perdure.networks.segmenter import Segmenter
from perdure.networks.weights import load_backbone_weights

TINY = "tiny_resnet"
PAPER_DILATIONS = (6, 12, 18)
PAPER_STRIDE = 16
PAPER_SIZE = 512
PAPER_MOMENTUM = 0.01
TINY_SIZE = 64
TINY_MOMENTUM = 0.1


def deeplab(
    backbone: str = "resnet101",
    *,
    in_channels: int = 3,
    output_stride: int = 16,
    width: int = 256,
    dilations: Sequence[int] | None = None,
    input_size: int | None = None,
    dropout: float = 0.1,
    weights: str | Path = "random",
    norm_momentum: float | None = None,
    tiny_channels: Sequence[int] = (16, 32, 64, 128),
) -> Segmenter:
    """Build DeepLabV3 without classifiers. The defaults are the paper's network (42,500,160 + 16,125,440 parameters).

    Args:
        backbone: Any timm backbone with ``features_only`` and ``output_stride``, such as ``resnet101`` or
            ``mobilenetv3_small_100``, with or without timm's tag; or ``tiny_resnet``, four small stages for
            inputs of about 64 pixels (random weights or a file only).
        in_channels: Channels of the images.
        output_stride: Input pixels per feature cell: 8, 16 or 32; for ``tiny_resnet`` 4, 8 or 16.
        width: Channels of the features that feed the classifiers.
        dilations: Of the 3x3 branches, in feature cells. Not given: :func:`scaled_dilations`.
        input_size: Side of the training crops in pixels that default dilations are meant for; 512, or 64 for
            ``tiny_resnet``, if not given.
        dropout: Share of the ASPP's channels dropped in training.
        weights: Of the backbone: ``random``, ``installed`` (ImageNet weights of an installed package, for
            ``tf_efficientnet_lite0``), ``imagenet`` (torchvision's V1 weights where timm has them, as
            in the paper, unless the name has a tag) or a file, see ``load_backbone_weights``.
        norm_momentum: Of the backbone's BatchNorm layers; 0.01 (the paper's, for pretrained weights), or 0.1 for
            ``tiny_resnet``, whose statistics start from nothing, if not given.
        tiny_channels: Channels of the four stages of ``tiny_resnet``.

    Raises:
        UsageError: An option or the combination of options cannot be built.
        DataError: The weights do not fit.
    """
    tiny = backbone == TINY
    size = input_size if input_size is not None else TINY_SIZE if tiny else PAPER_SIZE
    momentum = norm_momentum if norm_momentum is not None else TINY_MOMENTUM if tiny else PAPER_MOMENTUM
    for name, value in {"width": width, "in_channels": in_channels, "input_size": size}.items():
        if value < 1:
            raise UsageError(f"deeplab: {name} is {value}", "give a positive number")
    if not 0 <= dropout < 1:
        raise UsageError(f"deeplab: dropout is {dropout}", "give a share of at least 0 and below 1")
    if not 0 < momentum <= 1:
        raise UsageError(f"deeplab: norm_momentum is {momentum}", "give a share above 0 and at most 1")
    strides = (4, 8, 16) if tiny else (8, 16, 32)
    if output_stride not in strides and (tiny or timm_knows(backbone)):
        raise UsageError(
            f"output_stride {output_stride} is not possible with {backbone}",
            f"use one of {', '.join(map(str, strides))}",
        )
    if tiny:
        trunk, channels = tiny_resnet(in_channels, output_stride, tiny_channels)
    else:
        trunk, channels = _timm_backbone(backbone, in_channels, output_stride)
    for norm in batch_norms(trunk):
        norm.momentum = momentum
    record = load_backbone_weights(trunk, weights)
    if dilations is None:
        dilations = scaled_dilations(output_stride, size)
    neck = Aspp(channels, width, dilations, dropout)
    body = DeepLabBody(trunk, neck)
    return Segmenter(body, width, output_stride, 2, in_channels=in_channels, least_batch=2, weights=record)


def scaled_dilations(output_stride: int, input_size: int = PAPER_SIZE) -> tuple[int, ...]:
    """Dilations that reach as far across the image as the paper's 6, 12, 18 do at stride 16 and 512 pixels.

    At stride 8 that is 12, 24, 36, as in DeepLabV3. Never below 1.
    """
    factor = PAPER_STRIDE / output_stride * input_size / PAPER_SIZE
    # halves go up: round() would send them to the nearest even number
    return tuple(max(1, int(dilation * factor + 0.5)) for dilation in PAPER_DILATIONS)


class DeepLabBody(nn.Module):
    """Backbone, then ASPP.

    Args:
        backbone: Image -> list of feature maps, or one; the last is used.
        neck: The ASPP.
    """

    def __init__(self, backbone: nn.Module, neck: Aspp) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` -> features ``(N, width, H / stride, W / stride)``, not negative."""
        maps: Tensor | list[Tensor] = self.backbone(images)
        features: Tensor = self.neck(maps if isinstance(maps, Tensor) else maps[-1])
        return features


class Aspp(nn.Module):
    """Atrous spatial pyramid pooling (spec STAR 2.2): five branches, concatenated, then two convolutions.

    Args:
        in_channels: Channels of the backbone's last map.
        width: Channels of each branch and of the output.
        dilations: One 3x3 branch each.
        dropout: Between the two last convolutions.
    """

    def __init__(self, in_channels: int, width: int, dilations: Sequence[int], dropout: float) -> None:
        super().__init__()
        if not dilations or min(dilations) < 1:
            raise UsageError(
                f"deeplab: dilations {list(dilations)} are not positive numbers", "give for example [6, 12, 18]"
            )
        self.branches = nn.ModuleList(
            [_unit(in_channels, width, 1), *(_unit(in_channels, width, 3, d) for d in dilations)]
        )
        self.pool = _unit(in_channels, width, 1)
        self.project = nn.Sequential(_unit((len(dilations) + 2) * width, width, 1), nn.Dropout(dropout))
        self.refine = _unit(width, width, 3)
        init_kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, h, w)`` -> ``(N, width, h, w)``, after the last ReLU.

        Raises:
            UsageError: One image in train mode: the pooled branch then has one value per channel to normalise.
        """
        norm = self.pool[1]
        # SyncBatchNorm, which is no BatchNorm2d, pools over the other processes too.
        if x.shape[0] == 1 and norm.training and isinstance(norm, nn.BatchNorm2d):
            raise UsageError(
                "DeepLabV3 cannot train on a batch of one image: its pooling branch would normalise single values",
                "use a batch size of at least 2 in every process, or freeze normalisation (freeze_norm)",
            )
        pooled: Tensor = self.pool(x.mean((2, 3), keepdim=True))
        # Resizing a single cell bilinearly is repeating it.
        maps = [*(branch(x) for branch in self.branches), pooled.expand(-1, -1, *x.shape[2:])]
        out: Tensor = self.refine(self.project(torch.cat(maps, 1)))
        return out


def _unit(in_channels: int, out_channels: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    """Convolution without bias that keeps the size, BatchNorm, ReLU."""
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=padding, dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def timm_knows(name: str) -> bool:
    """True for a backbone of timm. Raises UsageError with the nearest name otherwise."""
    import timm

    if timm.is_model(name):
        return True
    close = nearest(name, [TINY, *timm.list_models()])
    few = f"for example resnet18, resnet50, resnet101, mobilenetv3_small_100 or {TINY}"
    raise UsageError(f"unknown backbone '{name}'", close if close.startswith("did") else few)


def _timm_backbone(name: str, in_channels: int, output_stride: int) -> tuple[nn.Module, int]:
    import timm

    timm_knows(name)
    architecture, _, tag = name.partition(".")
    if tag and not timm.models.is_model_pretrained(name):
        known = timm.list_pretrained(f"{architecture}.*")
        raise UsageError(f"backbone '{architecture}' has no published weights '{tag}'", nearest(name, known))
    torchvision_v1 = f"{architecture}.tv_in1k"  # the weights of the paper; timm's own default is a later recipe
    tagged = torchvision_v1 if not tag and timm.models.is_model_pretrained(torchvision_v1) else name
    try:
        trunk: Any = timm.create_model(
            tagged, features_only=True, out_indices=(-1,), output_stride=output_stride, in_chans=in_channels
        )
    except (TypeError, AssertionError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"backbone '{name}' cannot be built with output_stride {output_stride} and {in_channels} input channels",
            "use a convolutional backbone, for example resnet18, mobilenetv3_small_100 or convnext_atto",
        ) from error
    stride = trunk.feature_info.reduction()[-1]
    if stride != output_stride:
        raise UsageError(
            f"backbone '{name}' ignores output_stride {output_stride}: its stride is {stride}",
            "set that output_stride, or use another backbone",
        )
    return trunk, trunk.feature_info.channels()[-1]


def tiny_resnet(in_channels: int, output_stride: int, channels: Sequence[int]) -> tuple[nn.Module, int]:
    """A residual net of four small stages, and the channels of its last. Raises UsageError for impossible channels."""
    from timm.models.resnet import BasicBlock, ResNet

    if len(channels) != 4 or min(channels) < 2 or channels[0] % 2:
        raise UsageError(
            f"tiny_channels {list(channels)} must be four numbers, the first even", "give for example [16, 32, 64, 128]"
        )
    trunk: Any = ResNet(
        BasicBlock,
        (1, 1, 1, 1),
        num_classes=0,
        global_pool="",
        in_chans=in_channels,
        output_stride=2 * output_stride,
        stem_width=channels[0] // 2,
        stem_type="deep",
        channels=tuple(channels),
    )
    trunk.pretrained_cfg = {"architecture": TINY}  # what messages about its weights call it
    trunk.maxpool = nn.Identity()  # small inputs: a stem of stride 2 instead of 4, hence twice the stride above
    return trunk, channels[-1]
