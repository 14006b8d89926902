"""Geometry, augmentation and normalisation: photographs with masks (STAR, 1.5), images with one class (CCSI, 1.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from perdure.data.dataset import Transform
from perdure.errors import DataError

IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)
ASPECT: Final = (3 / 4, 4 / 3)
# torch's "nearest" rounds down and shifts a mask by half a pixel; the exact one agrees with PIL's
_NEAREST = InterpolationMode.NEAREST_EXACT
_BILINEAR = InterpolationMode.BILINEAR


def normalise(images: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """``(x - mean) / std`` a channel, float32.

    Args:
        images: ``(..., C, H, W)``; uint8 is taken as 0..255, floating point as 0..1.
        mean: One number a channel.
        std: One number a channel.

    Raises:
        DataError: The number of channels differs from that of ``mean`` and ``std``.
    """
    if images.shape[-3] != len(mean) or len(mean) != len(std):
        raise DataError(
            f"an image has {images.shape[-3]} channels, mean and std have {len(mean)} and {len(std)} numbers",
            "give augment.mean and augment.std one number a channel",
        )
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    shift = torch.tensor(mean, dtype=torch.float32, device=images.device).view(-1, 1, 1) * scale
    width = torch.tensor(std, dtype=torch.float32, device=images.device).view(-1, 1, 1) * scale
    return (images.to(torch.float32) - shift) / width


@dataclass(frozen=True)
class _Train:
    """See :func:`train_transform`. A class and not a closure, so that worker processes can receive it."""

    crop: int
    area: tuple[float, float]
    flip: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        top, left, height, width = RandomResizedCrop.get_params(image, list(self.area), list(ASPECT))
        image = image[:, top : top + height, left : left + width]
        label = label[top : top + height, left : left + width]
        image, label = _resize(image, label, self.crop, self.crop)
        if self.flip > 0 and torch.rand(()).item() < self.flip:
            image, label = image.flip(-1), label.flip(-1)
        return normalise(image, self.mean, self.std), label.long()


@dataclass(frozen=True)
class _Eval:
    """See :func:`eval_transform`."""

    size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        if self.size is not None:
            image, label = _resize(image, label, *shorter_to(self.size, label.shape[0], label.shape[1]))
            top, left = (round((side - self.size) / 2) for side in label.shape)
            image = image[:, top : top + self.size, left : left + self.size]
            label = label[top : top + self.size, left : left + self.size]
        return normalise(image, self.mean, self.std), label.long()


@dataclass(frozen=True)
class _Class:
    """See :func:`class_transform`."""

    side: int
    flip: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        image = fit_square(image, self.side)
        if self.flip > 0 and torch.rand(()).item() < self.flip:
            image = image.flip(-1)
        return normalise(image, self.mean, self.std), label.long()


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
    top, left = (round((length - side) / 2) for length in image.shape[-2:])
    return image[..., top : top + side, left : left + side]


def shorter_to(size: int, height: int, width: int) -> tuple[int, int]:
    """Height and width after scaling the shorter side to ``size``; the longer one is rounded down."""
    short = min(height, width)
    return size * height // short, size * width // short


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Scale an image ``(..., C, H, W)`` bilinearly with anti-aliasing; uint8 stays uint8."""
    scaled: Tensor = F.resize(image, [height, width], interpolation=_BILINEAR, antialias=True)
    return scaled


def _resize(image: Tensor, label: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Image bilinear with anti-aliasing (uint8 stays uint8: the fast path), label nearest."""
    if label.shape == (height, width):
        return image, label
    label = F.resize(label[None], [height, width], interpolation=_NEAREST)[0]
    return resize(image, height, width), label


def train_transform(
    crop: int,
    area: tuple[float, float] = (0.5, 2.0),
    flip: float = 0.5,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Transform:
    """Random resized crop, flip, normalisation; draws from torch's generator only.

    A box with an area of u ~ U(``area``) times the image's and a log-uniform aspect in [3/4, 4/3] is accepted if it
    fits into the image; after ten tries the largest centred box of allowed aspect is taken. u above 1 never fits:
    the upper bound 2 makes the whole-image fallback frequent, as in STAR.

    Args:
        crop: Height and width of the result.
        area: Range of u.
        flip: Probability of a horizontal flip.
        mean: One number a channel.
        std: One number a channel.
    """
    return _Train(crop, (area[0], area[1]), flip, tuple(mean), tuple(std))


def eval_transform(
    size: int | None, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Transform:
    """Scale the shorter side to ``size`` and take the centre ``size`` × ``size``; ``None``: the full image as it is."""
    return _Eval(size, tuple(mean), tuple(std))


def class_transform(side: int, mean: Sequence[float], std: Sequence[float], flip: float = 0.0) -> Transform:
    """Square, flip and normalise an image that has one class; the label ``()`` stays as it is.

    With mean 0 and std 1 values are in [0, 1] and the padded border is 0 (CCSI, 1.2). Draws from torch's generator
    only, and only if ``flip`` is above 0.

    Args:
        side: Height and width of the result; see :func:`fit_square`.
        mean: One number a channel.
        std: One number a channel.
        flip: Probability of a horizontal flip.
    """
    return _Class(side, flip, tuple(mean), tuple(std))
