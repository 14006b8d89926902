"""Image encoders that end in CLIP's joint space of images and texts (spec CLIP-CISS 2.1)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import ConfigDict
from torch import Tensor, nn

from perdure.errors import UsageError
from perdure.networks.segmenter import upsample


class EncoderOutput(NamedTuple):
    """An image batch, encoded. All maps have the same cells ``(h, w)``.

    Args:
        maps: Intermediate maps ``(B, Dv, h, w)``, deepest last; the decoder reads them from the last to the first.
        cls: One vector ``(B, D)`` per image in the joint space, float32, of length 1.
        dense: One vector per cell in the joint space: ``(B, D, h, w)``, float32, of length 1 along D.
    """

    maps: tuple[Tensor, ...]
    cls: Tensor
    dense: Tensor

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return sum(part.nbytes for part in (*self.maps, self.cls, self.dense))


class MapsEncoder(nn.Module):
    """What the decoder asks of an image encoder.

    Args:
        widths: Channels of each map, deepest last.
        dim: Length of vectors in the joint space.
        stride: Each side of an image must be a multiple of it; input pixels per cell unless ``cell`` says another.
        fresh: Names of parts whose weights never come from a file. They learn as fast as the decoder.
    """

    def __init__(self, widths: Iterable[int], dim: int, stride: int, fresh: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.dim = dim
        self.stride = stride
        self.cell = stride
        self.fresh = fresh

    def forward(self, images: Tensor) -> EncoderOutput:
        """Encode images ``(B, C, H, W)`` whose sides are multiples of the stride."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """Parts that may be frozen, shallow to deep; everything before the first of them goes with it."""
        raise NotImplementedError

    def after_blocks(self) -> list[nn.Module]:
        """Parts behind the last block."""
        raise NotImplementedError


@dataclass(frozen=True)
class VitShape:
    """Sizes of a CLIP vision transformer; the defaults are ViT-B/16's.

    Args:
        patch: Side of a patch in pixels.
        width: Channels of the residual stream.
        depth: Number of blocks.
        heads: Attention heads; OpenAI's models have one per 64 channels.
        dim: Length of vectors in the joint space.
        feature_blocks: Blocks, counted from 0, whose output is exported, in ascending order.
        activation: ``quick_gelu`` (OpenAI's models) or ``gelu`` (many of open_clip's).

    Raises:
        UsageError: The sizes do not go together.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # a recipe gives it as a mapping

    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    dim: int = 512
    feature_blocks: tuple[int, ...] = (5, 7, 11)
    activation: str = "quick_gelu"

    def __post_init__(self) -> None:
        if min(self.patch, self.width, self.depth, self.heads, self.dim) < 1 or self.width % self.heads:
            raise UsageError(
                f"a vision transformer of width {self.width}, {self.heads} heads, depth {self.depth} and patch "
                f"{self.patch} cannot be built",
                "give positive numbers, and a width that is a multiple of the heads",
            )
        blocks = self.feature_blocks
        if not blocks or list(blocks) != sorted(set(blocks)) or not 0 <= blocks[0] <= blocks[-1] < self.depth:
            raise UsageError(
                f"feature_blocks {list(blocks)} do not fit {self.depth} blocks",
                f"give ascending numbers from 0 to {self.depth - 1}, one per stage of the decoder",
            )
        if self.activation not in ("quick_gelu", "gelu"):
            raise UsageError(f"unknown activation '{self.activation}'", "known: gelu, quick_gelu")


VIT_B16 = VitShape()
NARROW = VitShape(patch=8, width=96, depth=6, heads=4, dim=64, feature_blocks=(1, 3, 5))
"""Not from the paper: small enough to be trained from random weights on two cores, for images of about 64 pixels."""


class ClipEncoder(MapsEncoder):
    """CLIP's vision transformer on transformers' classes, for images of any sides that are multiples of the patch.

    Its parameters have the names of transformers' ``CLIPVisionModelWithProjection``. ``feats`` are taken from the
    residual stream before the last normalisation.

    Args:
        shape: Sizes.
        input_size: Side in pixels that the position table is made for: the training crop's.
        double_class_embedding: Add the class embedding twice to the class token, as the published code does. The same
            could be had by changing the position table once, but not the same optimiser steps.
        in_channels: Channels of the images.

    Raises:
        UsageError: transformers is not installed, or ``input_size`` is no multiple of the patch.
    """

    def __init__(
        self, shape: VitShape, input_size: int, *, double_class_embedding: bool = True, in_channels: int = 3
    ) -> None:
        super().__init__([shape.width] * len(shape.feature_blocks), shape.dim, shape.patch)
        if input_size < shape.patch or input_size % shape.patch:
            raise UsageError(
                f"input_size {input_size} is no multiple of the patch of {shape.patch} pixels",
                f"give for example {max(1, round(input_size / shape.patch)) * shape.patch}",
            )
        self.shape = shape
        self.double_class_embedding = double_class_embedding
        model = _vision_model(shape, input_size, in_channels)
        self.vision_model = model.vision_model
        self.visual_projection = model.visual_projection

    def forward(self, images: Tensor) -> EncoderOutput:
        """Encode images ``(B, C, H, W)`` whose sides are multiples of the patch.

        Raises:
            UsageError: They are not.
        """
        if images.shape[2] % self.stride or images.shape[3] % self.stride:
            raise UsageError(
                f"images of {images.shape[2]}×{images.shape[3]} pixels are no whole number of patches",
                f"crop or pad both sides to multiples of {self.stride}",
            )
        vit: Any = self.vision_model
        patches: Tensor = vit.embeddings.patch_embedding(images)
        grid = (patches.shape[2], patches.shape[3])
        first = vit.embeddings.class_embedding.expand(len(images), 1, -1)
        if self.double_class_embedding:
            first = 2 * first
        # Under autocast the sum with the float32 table makes the residual stream float32, and it stays so: each block
        # adds to it. So every normalisation computes in float32, also where autocast has no rule for it (CPU).
        stream = torch.cat([first.float(), patches.float().flatten(2).mT], 1) + self.positions(grid)
        stream = vit.pre_layrnorm(stream)
        maps = []
        for index, block in enumerate(vit.encoder.layers):
            stream = block(stream, attention_mask=None)
            if index in self.shape.feature_blocks:
                maps.append(_as_map(stream[:, 1:], grid))
        joint = self.visual_projection(vit.post_layernorm(stream)).float()
        joint = F.normalize(joint, dim=-1)
        return EncoderOutput(tuple(maps), joint[:, 0], _as_map(joint[:, 1:], grid))

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Position table for a grid of ``(h, w)`` patches, ``(1 + h w, width)``, the class token's first."""
        return resize_positions(self.vision_model.embeddings.position_embedding.weight, grid)

    def blocks(self) -> list[nn.Module]:
        """The transformer's blocks."""
        return list(self.vision_model.encoder.layers)

    def after_blocks(self) -> list[nn.Module]:
        """Last normalisation and projection."""
        return [self.vision_model.post_layernorm, self.visual_projection]


def resize_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize the grid part of a position table ``(1 + n n, width)`` to ``(1 + h w, width)``; the first row stays.

    Bilinear as in the published code; transformers' own way is bicubic and gives other numbers.
    """
    side = round((len(table) - 1) ** 0.5)
    if grid == (side, side):
        return table
    resized = upsample(_as_map(table[None, 1:].float(), (side, side)), grid)
    return torch.cat([table[:1], resized[0].flatten(1).mT.to(table.dtype)])


def _as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens ``(B, h w, D)`` -> map ``(B, D, h, w)``."""
    return tokens.mT.reshape(len(tokens), -1, *grid)


def _vision_model(shape: VitShape, input_size: int, in_channels: int) -> Any:
    try:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    except ImportError as error:
        raise UsageError("CLIP encoders need the package transformers", "pip install 'perdure[clip]'") from error
    # transformers 5 moved the parts of CLIPVisionModel, but not of this class: the names are those of published files
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=shape.width,
            intermediate_size=4 * shape.width,
            projection_dim=shape.dim,
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads,
            num_channels=in_channels,
            image_size=input_size,
            patch_size=shape.patch,
            hidden_act=shape.activation,
        )
    )
