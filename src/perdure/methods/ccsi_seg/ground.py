"""What training images say of everything that is no class: tone, colours, texture, range; and new ground like it."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

BANDS: Final = 16
"""Rings of spatial frequency in which the power of the texture is kept."""
BINS: Final = 1024
RANGE: Final = 16.0
"""Intensities are counted in BINS steps of ± RANGE; normalised images lie well inside."""
RARE: Final = 1e-3
"""Share of the pixels at either end that do not stretch the intensity window."""


def ground_sums(images: Tensor, ground: Tensor, side: int) -> dict[str, Tensor]:
    """Sums over images.

    Args:
        images: ``(N, C, H, W)``.
        ground: ``(N, H, W)`` bool, pixels without a class.
        side: P, side of the mean ground.

    Returns:
        ``images ()`` int64; ``intensities (C, BINS)`` int64, of all pixels; ``ground (C, P, P)`` and
        ``ground_seen (1, P, P)``; ``tones (C,)`` and ``tones2 (C, C)`` of the mean colour of the ground;
        ``texture (C, C)``, covariance within the ground; ``power (BANDS,)``.
    """
    images, channels = images.double(), images.shape[1]
    step = ((images + RANGE) * (BINS / (2 * RANGE))).long().clamp_(0, BINS - 1)
    step += torch.arange(channels, device=images.device).view(1, -1, 1, 1) * BINS
    mask = ground[:, None].double()
    area = mask.sum((2, 3)).clamp_min(1.0)
    tones = (images * mask).sum((2, 3)) / area
    around = (images - tones[:, :, None, None]) * mask
    flat = around.flatten(2)
    return {
        "images": torch.tensor(len(images), device=images.device),
        "intensities": torch.bincount(step.flatten(), minlength=channels * BINS).view(channels, BINS),
        "ground": F.adaptive_avg_pool2d(images * mask, side).sum(0),
        "ground_seen": F.adaptive_avg_pool2d(mask, side).sum(0),
        "tones": tones.sum(0),
        "tones2": tones.T @ tones,
        "texture": (flat @ flat.mT / area[:, :, None]).sum(0),
        "power": _power(around).sum(0),
    }


def window(intensities: Tensor) -> Tensor:
    """Lowest and highest intensity of each channel ``(2, C)`` float32, but for RARE outliers at either end."""
    share = intensities.double().cumsum(1) / intensities.sum(1, keepdim=True).clamp_min(1)
    low = (share <= RARE).sum(1)
    high = (share < 1 - RARE).sum(1) + 1
    return torch.stack([low, high]).float() * (2 * RANGE / BINS) - RANGE


def encode(images: Tensor, ends: Tensor) -> Tensor:
    """Intensities ``(..., C, H, W)`` as uint8: 0 and 255 are the ends ``(2, C)`` of the window."""
    low, high = ends[:, :, None, None]
    codes: Tensor = ((images - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8)
    return codes


def decode(codes: Tensor, ends: Tensor) -> Tensor:
    """Inverse of :func:`encode`, float32."""
    low, high = ends[:, :, None, None]
    images: Tensor = codes.float() / 255 * (high - low) + low
    return images


def grow_ground(
    count: int, size: tuple[int, int], mean: Tensor, tones: Tensor, texture: Tensor, power: Tensor
) -> Tensor:
    """Fresh ground ``(count, C, H, W)``: the mean ground, a random tone, and noise with the texture's spectrum.

    Uses torch's generator.

    Args:
        count: Images.
        size: H, W.
        mean: Mean ground ``(C, P, P)``.
        tones: Covariance of the tone between images ``(C, C)``.
        texture: Covariance of colour within an image ``(C, C)``.
        power: Spectrum ``(BANDS,)``.
    """
    channels = len(mean)
    still = F.interpolate(mean[None], size, mode="bilinear", align_corners=False)
    tone = torch.randn(count, channels, device=mean.device) @ root(tones).T
    noise = torch.fft.rfft2(torch.randn(count, channels, *size, device=mean.device))
    shape = power.clamp_min(0).sqrt()[_band(size, mean.device)]
    noise = torch.fft.irfft2(noise * shape, s=size)
    noise = noise / noise.std((2, 3), keepdim=True).clamp_min(1e-6)
    noise = torch.einsum("dc,nchw->ndhw", root(texture), noise)
    return still + tone[:, :, None, None] + noise


def root(covariance: Tensor) -> Tensor:
    """Symmetric root of a covariance ``(..., C, C)``; rounding errors below 0 count as 0."""
    values, vectors = torch.linalg.eigh(covariance.double())
    half: Tensor = (vectors * values.clamp_min(0).sqrt()[..., None, :]) @ vectors.mT
    return half.to(covariance)


def _power(around: Tensor) -> Tensor:
    """Mean power of each frequency band ``(N, BANDS)``, mean over channels."""
    size = (around.shape[2], around.shape[3])
    power = torch.fft.rfft2(around).abs().square().mean(1).flatten(1)
    band = _band(size, around.device).flatten()
    many = torch.bincount(band, minlength=BANDS).clamp_min(1)
    sums: Tensor = power.new_zeros(len(power), BANDS).index_add_(1, band, power)
    return sums / many


def _band(size: tuple[int, int], device: torch.device) -> Tensor:
    """Band of each frequency of ``rfft2`` ``(H, W // 2 + 1)``; bands are equally wide in the root of the frequency."""
    y = torch.fft.fftfreq(size[0], device=device)[:, None]
    x = torch.fft.rfftfreq(size[1], device=device)[None]
    far = (y.square() + x.square()).sqrt() / 0.5**0.5
    band: Tensor = (far.sqrt() * BANDS).long()
    return band.clamp_max(BANDS - 1)
