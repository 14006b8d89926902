"""Geometry and normalisation of images and labels, as pure functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from perdure.errors import DataError

IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)
ASPECT: Final = (3 / 4, 4 / 3)


def normalise(images: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """``(x - mean) / std`` per channel, float32.

    Args:
        images: ``(..., C, H, W)``; uint8 is taken as 0..255, floating point as 0..1.
        mean: One number per channel.
        std: One number per channel.

    Raises:
        DataError: The number of channels differs from that of ``mean`` and ``std``.
    """
    if images.shape[-3] != len(mean) or len(mean) != len(std):
        raise DataError(
            f"an image has {images.shape[-3]} channels, mean and std have {len(mean)} and {len(std)} numbers",
            "give augment.mean and augment.std one number per channel",
        )
    # mean and std are scaled instead of the image: one pass over the pixels less
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    shift = torch.tensor(mean, dtype=torch.float32, device=images.device).view(-1, 1, 1) * scale
    width = torch.tensor(std, dtype=torch.float32, device=images.device).view(-1, 1, 1) * scale
    return (images.to(torch.float32) - shift) / width


def random_resized_crop(
    image: Tensor, label: Tensor, size: Sequence[int], area: tuple[float, float] = (0.5, 2.0)
) -> tuple[Tensor, Tensor]:
    """Cut the same random box out of image and label and scale it to ``size``; draws from torch's generator only.

    A box with an area of u ~ U(``area``) times the image's and a log-uniform aspect in [3/4, 4/3] is accepted if it
    fits into the image; after ten tries the largest centred box of allowed aspect is taken. u above 1 never fits:
    the upper bound 2 makes the whole-image fallback frequent, as in STAR (spec 1.5).
    """
    top, left, height, width = RandomResizedCrop.get_params(image, list(area), list(ASPECT))
    image = image[:, top : top + height, left : left + width]
    label = label[top : top + height, left : left + width]
    return resize(image, *size), resize_label(label, *size)


def fit_square(image: Tensor, side: int) -> Tensor:
    """Bring an image to ``side`` × ``side``.

    One that fits into the square is padded with zeros around its centre (28 pixels in 32: two on each side; an odd
    rest goes to the bottom and the right). Any other is scaled until its shorter side is ``side``, then cut
    to the centre.

    Args:
        image: ``(..., C, H, W)``; uint8 stays uint8.
        side: Height and width of the result.
    """
    height, width = image.shape[-2:]
    if height == width == side:
        return image
    if height <= side and width <= side:
        top, left = (side - height) // 2, (side - width) // 2
        square = image.new_zeros((*image.shape[:-2], side, side))
        square[..., top : top + height, left : left + width] = image
        return square
    if min(height, width) != side:
        image = resize(image, *shorter_to(side, height, width))
    return centre(image, side)


def centre(maps: Tensor, side: int) -> Tensor:
    """The central ``side`` × ``side`` of images or label maps ``(..., H, W)``."""
    # rounded as torchvision's CenterCrop does, so that label maps are cut where its images would be
    top, left = (round((length - side) / 2) for length in maps.shape[-2:])
    return maps[..., top : top + side, left : left + side]


def shorter_to(size: int, height: int, width: int) -> tuple[int, int]:
    """Height and width after scaling the shorter side to ``size``; the longer one is rounded down."""
    short = min(height, width)
    return size * height // short, size * width // short


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Scale an image ``(..., C, H, W)`` bilinearly with anti-aliasing; uint8 stays uint8, which is the fast path."""
    if image.shape[-2:] == (height, width):
        return image
    scaled: Tensor = F.resize(image, [height, width], interpolation=InterpolationMode.BILINEAR, antialias=True)
    return scaled


def resize_label(label: Tensor, height: int, width: int) -> Tensor:
    """Scale a label map ``(H, W)`` to the nearest pixel."""
    if label.shape == (height, width):
        return label
    # torch's "nearest" rounds down and shifts a mask by half a pixel; the exact one agrees with PIL's
    scaled: Tensor = F.resize(label[None], [height, width], interpolation=InterpolationMode.NEAREST_EXACT)[0]
    return scaled


def scale_scores(scores: Tensor, size: Sequence[int]) -> Tensor:
    """Scores ``(N, k, *s)`` at another spatial size, linear along every axis; ``(N, k)`` stay as they are."""
    if scores.shape[2:] == torch.Size(size) or scores.ndim == 2:
        return scores
    # pixels are areas, not points (align_corners=False), as where images were resized: maps do not drift at the border
    mode = "trilinear" if scores.ndim == 5 else "bilinear"
    return nnf.interpolate(scores, list(size), mode=mode, align_corners=False)


def nearest(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps ``(N, *s)`` on a grid of another size, each pixel from the one that it lies in."""
    for axis, (length, wanted) in enumerate(zip(maps.shape[1:], size, strict=True), 1):
        if length != wanted:
            at = (torch.arange(wanted, device=maps.device) * 2 + 1) * length // (2 * wanted)
            maps = maps.index_select(axis, at)
    return maps
