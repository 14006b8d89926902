"""The statistics that cross a task boundary: how sums become buffers, and buffers the looks and ground of synthesis."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from perdure.methods.ccsi_seg.ground import BANDS, decode, encode, grow_ground, window
from perdure.methods.ccsi_seg.layouts import Looks
from perdure.methods.ccsi_seg.moments import Sums, moments
from perdure.methods.ccsi_seg.regions import FACTS
from perdure.methods.ccsi_seg.synthesis import Bank

LEAST_CELLS: Final = 16.0
"""Cells under a class's mask in the finest layer from which on moments of it are trusted."""

SHOWN: Final = ("patches", "masks")
BUFFERS: Final = (
    "regions",
    "facts",
    "together",
    "colors",
    "color_spread",
    "ends",
    "size",
    "ground",
    "tones",
    "texture",
    "power",
    "moments",
    "class_moments",
)


class Statistics(nn.Module):
    """Statistics of all classes so far, in learning order, and of the ground of the latest task.

    Buffers: ``patches (K, C, P, P)`` and ``masks (K, 1, P, P)`` uint8; ``regions (K,)`` int64, regions that were
    averaged; ``facts (K, FACTS, 2)``; ``together (K, K)`` int64, images that show both classes; ``colors (K, 2C)``,
    ``color_spread (K, 2C, 2C)``; ``ends (2, C)``, the intensity window of the first task, in which uint8 is coded;
    ``size (2,)`` int64, H and W; ``ground (C, P, P)`` uint8, ``tones (C, C)``, ``texture (C, C)``, ``power (BANDS,)``;
    ``moments (2, T)`` and ``class_moments (K, 2, T)``. All but ``patches`` and ``masks`` are float32 unless said.
    """

    patches: Tensor
    masks: Tensor
    regions: Tensor
    facts: Tensor
    together: Tensor
    colors: Tensor
    color_spread: Tensor
    ends: Tensor
    size: Tensor
    ground: Tensor
    tones: Tensor
    texture: Tensor
    power: Tensor
    moments: Tensor
    class_moments: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in (*SHOWN, *BUFFERS):
            self.register_buffer(name, torch.zeros(0))

    @property
    def classes(self) -> int:
        """K."""
        return len(self.regions)

    def update(self, sums: dict[str, Tensor], old: int, layers: Tensor) -> None:
        """Take in what a pass over a task's images measured.

        Args:
            sums: Of :func:`regions.region_sums` (new classes) and :func:`ground.ground_sums`, and ``together (K, K)``,
                ``weight``, ``values``, ``squares`` of the moments (row 0: everything, then a row a class), ``size``.
            old: Classes before this task.
            layers: Layer of each channel of the moments.
        """
        if not old:
            self.ends = window(sums["intensities"])
        self.size = sums["size"] // sums["images"]
        self._take_ground(sums)
        self._take_classes(sums, old)
        self._take_moments(sums, old, layers)

    def _take_ground(self, sums: dict[str, Tensor]) -> None:
        images = sums["images"].double().clamp_min(1.0)
        mean = sums["tones"] / images
        seen = sums["ground_seen"]
        # where the ground was never seen, its mean colour
        ground = torch.where(seen > 0, sums["ground"] / seen.clamp_min(1e-6), mean[:, None, None])
        self.ground = encode(ground.float(), self.ends)
        self.tones = (sums["tones2"] / images - mean[:, None] * mean).float()
        self.texture = (sums["texture"] / images).float()
        power = sums["power"] / images
        self.power = (power / power.sum().clamp_min(1e-12)).float().view(BANDS)

    def _take_classes(self, sums: dict[str, Tensor], old: int) -> None:
        many = sums["regions"].double().clamp_min(1.0)
        inside = sums["inside"].clamp_min(1e-6)
        grey = decode(torch.full_like(self.ground, 127), self.ends).double()
        patches = torch.where(sums["inside"] > 0, sums["patches"] / inside, grey)
        mean = sums["facts"] / many[:, None]
        deviation = (sums["facts2"] / many[:, None] - mean.square()).clamp_min(0).sqrt()
        colors = sums["colors"] / many[:, None]
        spread = sums["colors2"] / many[:, None, None] - colors[:, :, None] * colors[:, None]
        self._append("patches", encode(patches.float(), self.ends), old)
        self._append("masks", (sums["masks"] / inside * 255).round().clamp(0, 255).to(torch.uint8), old)
        self._append("regions", sums["regions"], old)
        self._append("facts", torch.stack([mean, deviation], 2).float().view(-1, FACTS, 2), old)
        self._append("colors", colors.float(), old)
        self._append("color_spread", spread.float(), old)
        together = sums["together"].clone()
        if old:
            together[:old, :old] += self.together[:old, :old]
        self.together = together

    def _take_moments(self, sums: dict[str, Tensor], old: int, layers: Tensor) -> None:
        found = Sums(sums["weight"], sums["values"], sums["squares"])
        values = moments(found, layers).float()
        by_class = values[:, 1:].transpose(0, 1).clone()
        enough = found.weight[1:].amax(1) >= LEAST_CELLS
        by_class[~enough] = 0.0
        if old:  # an old class that these images hardly show keeps what was measured when it was learned
            by_class[:old] = torch.where(enough[:old, None, None], by_class[:old], self.class_moments[:old])
        self.moments, self.class_moments = values[:, 0].clone(), by_class

    def _append(self, name: str, rows: Tensor, old: int) -> None:
        present = getattr(self, name)
        setattr(self, name, torch.cat([present[:old], rows.to(present.device)]) if old else rows)

    def looks(self) -> Looks:
        """What synthesis needs to know of the classes."""
        alone = self.together.diagonal().clamp_min(1).double()
        # each side saw the other in its own task only: the larger share is the one that was measured
        chance = torch.maximum(self.together / alone[:, None], self.together.T / alone)
        chance = chance.fill_diagonal_(0.0) * (self.regions > 0)
        masks, patches = self.masks.float() / 255, decode(self.patches, self.ends)
        return Looks(masks, patches, self.facts, chance.float(), self.colors, self.color_spread)

    def bank(self) -> Bank:
        """Moments to match."""
        return Bank(self.moments, self.class_moments.transpose(0, 1))

    def fresh_ground(self, count: int, textured: bool) -> Tensor:
        """Ground for ``count`` images: textured, or the mean ground as it is."""
        height, width = self.size.tolist()
        mean = decode(self.ground, self.ends)
        still = torch.zeros_like(self.tones)
        tones, texture = (self.tones, self.texture) if textured else (still, still)
        return grow_ground(count, (height, width), mean, tones, texture, self.power)
