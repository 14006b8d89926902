"""Random scaling, cutting and colours of photographs, as detection code bases have them (spec CLIP-CISS 1.4).

All draws are torch's, so a seed decides them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from perdure.data.transforms import resize, resize_label
from perdure.labels import IGNORE

LONGEST: Final = 2048
"""Longest side of a scaled image in pixels, whatever the shorter one would be."""
GREY: Final = 128 / 255
"""What an image that is smaller than the crop is filled up with, before it is normalised."""


def shorter_within(short: int, height: int, width: int, longest: int = LONGEST) -> tuple[int, int]:
    """Height and width after scaling the shorter side to ``short``, or the longer one to ``longest`` if that is less.

    Rounded to the nearest pixel.
    """
    scale = min(short / min(height, width), longest / max(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def scaled_crop(image: Tensor, label: Tensor, size: Sequence[int], edges: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Scale the shorter side to one of ``edges``, each as likely, and cut a box of at most ``size`` anywhere.

    Args:
        image: ``(C, H, W)``.
        label: ``(H, W)``.
        size: Height and width of the box; an image that is smaller along an axis keeps its length there.
        edges: Lengths in pixels.
    """
    short = edges[_below(len(edges))]
    scaled = shorter_within(short, *label.shape)
    image, label = resize(image, *scaled), resize_label(label, *scaled)
    height, width = (min(most, side) for most, side in zip(size, scaled, strict=True))
    top, left = _below(scaled[0] - height + 1), _below(scaled[1] - width + 1)
    box = (..., slice(top, top + height), slice(left, left + width))
    return image[box], label[box]


def filled(image: Tensor, label: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Fill up to ``size`` on the right and at the bottom: the image with grey, the label with ``IGNORE``."""
    missing = [0, size[1] - label.shape[1], 0, size[0] - label.shape[0]]
    if not any(missing):
        return image, label
    grey = 128 if image.dtype == torch.uint8 else GREY
    image = torch.nn.functional.pad(image, missing, value=grey)
    return image, torch.nn.functional.pad(label, missing, value=IGNORE)


def jitter_colors(image: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue, each with probability one half (SSD, Liu et al. 2016).

    Brightness by up to 32 of 255, contrast and saturation by a factor of 0.5 to 1.5, hue by up to a tenth of the
    circle. Contrast comes before or after saturation and hue, each as likely. Values are cut to their range after each.

    Args:
        image: ``(C, H, W)`` uint8, or floating point in 0..1. Saturation and hue need three channels.
    """
    top = 255.0 if image.dtype == torch.uint8 else 1.0
    pixels = image.float() / top
    if _half():
        pixels = (pixels + _between(-32, 32) / 255).clamp(0, 1)
    contrast_first = _half()
    if contrast_first and _half():
        pixels = (pixels * _between(0.5, 1.5)).clamp(0, 1)
    if _half():
        pixels = _saturated(pixels, _between(0.5, 1.5))
    if _half():
        # whole steps of the 180 into which OpenCV divides the circle
        turn = (_below(36) - 18) / 180
        pixels = F.adjust_hue(pixels, turn) if len(pixels) == 3 else pixels
    if not contrast_first and _half():
        pixels = (pixels * _between(0.5, 1.5)).clamp(0, 1)
    return (pixels * top).round().to(image.dtype) if image.dtype == torch.uint8 else pixels.to(image.dtype)


def _saturated(pixels: Tensor, factor: float) -> Tensor:
    """Saturation of HSV times a factor, at most 1; hue and value stay. Torchvision blends with grey, another thing."""
    value, low = pixels.amax(0), pixels.amin(0)
    saturation = (value - low) / value.clamp_min(1e-12)
    factors = (1 / saturation.clamp_min(1e-12)).clamp_max(factor)
    return value - (value - pixels) * factors


def _below(number: int) -> int:
    return int(torch.randint(number, ()).item())


def _half() -> bool:
    return bool(torch.rand(()).item() < 0.5)


def _between(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()).item())
