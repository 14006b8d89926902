"""The statistics that cross a task boundary: how sums become buffers, and buffers what synthesis draws from."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.methods.ccsi_seg.layouts import ClassAppearance, root
from perdure.methods.ccsi_seg.measurements import BINS, FACTS, RANGE, MomentSums, frequency_bands

RARE: Final = 1e-3
"""Share of the pixels at either end that do not stretch the intensity window."""
LEAST_CELLS: Final = 16.0
"""Cells under a class's mask in the finest layer from which on moments of it are trusted."""
SHOWN: Final = ("patches", "masks")
BUFFERS: Final = (
    "regions",
    "facts",
    "co_occurrence",
    "colors",
    "color_spread",
    "ends",
    "size",
    "background",
    "tones",
    "texture",
    "power",
    "moments",
    "class_moments",
)


class Statistics(nn.Module):
    """Statistics of all classes so far, in learning order, and of the background of the latest task.

    Buffers: ``patches (K, C, P, P)`` and ``masks (K, 1, P, P)`` uint8; ``regions (K,)`` int64, images whose
    region was averaged; ``facts (K, FACTS, 2)``; ``co_occurrence (K, K)`` int64, images that show both; ``colors
    (K, 2C)``, ``color_spread (K, 2C, 2C)``; ``ends (2, C)``, the intensity window of the first task, in which uint8 is
    coded; ``size (2,)`` int64, H and W; ``background (C, P, P)`` uint8, ``tones (C, C)``, ``texture (C, C)``, ``power
    (BANDS,)``; the moment bank ``moments (2, T)`` and ``class_moments (K, 2, T)``, zeros where nothing is known. All
    but ``patches`` and ``masks`` are float32 unless said.
    """

    patches: Tensor
    masks: Tensor
    regions: Tensor
    facts: Tensor
    co_occurrence: Tensor
    colors: Tensor
    color_spread: Tensor
    ends: Tensor
    size: Tensor
    background: Tensor
    tones: Tensor
    texture: Tensor
    power: Tensor
    moments: Tensor
    class_moments: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in (*SHOWN, *BUFFERS):
            self.register_buffer(name, torch.zeros(0))

    def update(self, sums: dict[str, Tensor], old: int, layers: Tensor, passes: int = 1) -> None:
        """Take in what a pass over a task's images measured.

        Args:
            sums: Of :func:`measurements.region_sums` (new classes) and :func:`measurements.background_sums`, and
                ``co_occurrence (K, K)``, ``weight``, ``values``, ``squares`` of the moments (row 0: everything, then
                one row per class), ``size``.
            old: Classes before this task.
            layers: Layer of each channel of the moments.
            passes: How often the pass saw each image.
        """
        if not old:
            self.ends = window(sums["intensities"])
        self.size = sums["size"] // sums["images"]
        self._update_background(sums)
        self._update_classes(sums, old)
        self._update_moments(sums, old, layers)
        # an image has one region of a class at most: at least so many images are behind a class's means
        new = -(-self.regions[old:] // passes)
        self.regions = torch.cat([self.regions[:old], new])

    def _update_background(self, sums: dict[str, Tensor]) -> None:
        images, seen = sums["images"].double().clamp_min(1.0), sums["background_seen"]
        tone = sums["tones"] / images
        # where the background was never seen, its mean colour
        mean = torch.where(seen > 0, sums["background"] / seen.clamp_min(1e-6), tone[:, None, None])
        self.background = encode(mean.float(), self.ends)
        self.tones = (sums["tones2"] / images - tone[:, None] * tone).float()
        self.texture = (sums["texture"] / images).float()
        power = sums["power"] / images
        self.power = (power / power.sum().clamp_min(1e-12)).float()

    def _update_classes(self, sums: dict[str, Tensor], old: int) -> None:
        many = sums["regions"].double().clamp_min(1.0)
        inside = sums["inside"].clamp_min(1e-6)
        grey = decode(torch.full_like(self.background, 127), self.ends).double()
        patches = torch.where(sums["inside"] > 0, sums["patches"] / inside, grey)
        masks = (sums["masks"] / inside * 255).round().clamp(0, 255).to(torch.uint8)
        mean = sums["facts"] / many[:, None]
        deviation = (sums["facts2"] / many[:, None] - mean.square()).clamp_min(0).sqrt()
        colors = sums["colors"] / many[:, None]
        spread = sums["colors2"] / many[:, None, None] - colors[:, :, None] * colors[:, None]

        def append(rows: Tensor, new: Tensor) -> Tensor:
            return torch.cat([rows[:old], new.to(rows.device)]) if old else new

        self.patches = append(self.patches, encode(patches.float(), self.ends))
        self.masks = append(self.masks, masks)
        self.regions = append(self.regions, sums["regions"])
        self.facts = append(self.facts, torch.stack([mean, deviation], 2).float().view(-1, FACTS, 2))
        self.colors = append(self.colors, colors.float())
        self.color_spread = append(self.color_spread, spread.float())
        co_occurrence = sums["co_occurrence"].clone()
        if old:
            co_occurrence[:old, :old] += self.co_occurrence[:old, :old]
        self.co_occurrence = co_occurrence

    def _update_moments(self, sums: dict[str, Tensor], old: int, layers: Tensor) -> None:
        found = MomentSums(sums["weight"], sums["values"], sums["squares"])
        values = found.moments(layers).float()
        by_class = values[:, 1:].transpose(0, 1).clone()
        enough = found.weight[1:].amax(1) >= LEAST_CELLS
        by_class[~enough] = 0.0
        if old:  # an old class that these images hardly show keeps what was measured when it was learned
            by_class[:old] = torch.where(enough[:old, None, None], by_class[:old], self.class_moments[:old])
        self.moments, self.class_moments = values[:, 0].clone(), by_class

    def appearance(self) -> ClassAppearance:
        """The classes as layouts are drawn from them."""
        alone = self.co_occurrence.diagonal().clamp_min(1).double()
        # each side saw the other in its own task only: the larger share is the one that was measured
        chance = torch.maximum(self.co_occurrence / alone[:, None], self.co_occurrence.T / alone)
        chance = chance.fill_diagonal_(0.0) * (self.regions > 0)
        masks, patches = self.masks.float() / 255, decode(self.patches, self.ends)
        return ClassAppearance(masks, patches, self.facts, chance.float(), self.colors, self.color_spread)


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


def draw_background(
    count: int, size: tuple[int, int], mean: Tensor, tones: Tensor, texture: Tensor, power: Tensor
) -> Tensor:
    """Backgrounds ``(count, C, H, W)``: the mean, a random tone, and noise with the texture's spectrum.

    Uses torch's generator.

    Args:
        count: Images.
        size: H, W.
        mean: Mean background ``(C, P, P)``.
        tones: Covariance of the tone between images ``(C, C)``.
        texture: Covariance of colour within an image ``(C, C)``.
        power: Spectrum ``(BANDS,)``.
    """
    still = F.interpolate(mean[None], size, mode="bilinear", align_corners=False)
    tone = torch.randn(count, len(mean), device=mean.device) @ root(tones).T
    noise = torch.fft.rfft2(torch.randn(count, len(mean), *size, device=mean.device))
    noise = torch.fft.irfft2(noise * power.clamp_min(0).sqrt()[frequency_bands(size, mean.device)], s=size)
    noise = noise / noise.std((2, 3), keepdim=True).clamp_min(1e-6)
    return still + tone[:, :, None, None] + torch.einsum("dc,nchw->ndhw", root(texture), noise)
