"""Geometry, augmentation and normalisation of photographs with masks (STAR, section 1.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from perdure.data.views import Transform
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
