"""Slices of volumes, and single medical images, for 2D networks."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from perdure.data.case import Case, Grid
from perdure.data.preparation import ends_of
from perdure.data.transforms import nearest, resize, resize_label, scale_scores
from perdure.data.volumes.augmentation import OUTSIDE, augmented, region_size
from perdure.data.volumes.options import Side
from perdure.data.volumes.preprocessing import region
from perdure.data.volumes.sampled import ANNOTATED, Ready, Sampled, checked
from perdure.labels import BACKGROUND, IGNORE
from perdure.seeds import derive_seed


class Slices2D(Sampled):
    """Slices of volumes along one axis, each scaled into the middle of a square.

    Intensities of a volume are cut at two of its own percentiles and scaled to [0, 1], because those of MR have no
    unit, then normalised per channel. The proportions of a slice stay; spacing is not changed.

    Attributes:
        axis: Raw axis that is cut; images without a third axis are one slice.
        intensity: The percentiles that become 0 and 1.
        size: Side of the square.
        mean: Of each channel, of values from 0 to 1.
        std: Of each channel.
        channels: A raw image with one channel is repeated to this number: networks for photographs take three.
    """

    kind: Literal["slices2d"] = "slices2d"
    dims: Literal[2, 3] = 2
    axis: int = Field(0, ge=0, le=2)
    intensity: tuple[float, float] = (0.5, 99.5)
    size: Side
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @model_validator(mode="after")
    def _sound(self) -> Slices2D:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"{self.channels} channels need as many means and standard deviations")
        if min(self.std) <= 0:
            raise ValueError("a standard deviation is not above 0")
        if not 0 <= self.intensity[0] < self.intensity[1] <= 100:
            raise ValueError("intensities are cut at two percentiles, smaller one first")
        if self.patch != (self.size, self.size) or self.dims != 2:
            raise ValueError("the patch of a slice is its square")
        return self

    @property
    def accepted_channels(self) -> tuple[int, ...]:
        """One channel, or as many as the network takes."""
        return (1, self.channels)

    @property
    def ends(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Black and white after the normalisation."""
        return ends_of(self.mean, self.std)

    @property
    def black(self) -> float:
        """The value around a slice: that of intensity 0 in the first channel."""
        return -self.mean[0] / self.std[0]

    def show(self, case: Case) -> Case:
        """All slices, ``(C, D, size, size)``, of a single image ``(C, size, size)``, and the way back."""
        image = self._window(case)
        if image.ndim == 3:
            return replace(case, image=self._square(image), grid=Grid(case.size))
        axes = (self.axis, *(axis for axis in range(3) if axis != self.axis))
        slices = self._square(image.movedim(self.axis + 1, 1).transpose(0, 1)).transpose(0, 1)
        return replace(case, image=slices, grid=Grid(tuple(image.shape[1:]), axes=axes))

    def restore(self, scores: Tensor, grid: Grid) -> Tensor:
        """Scores ``(N, k, size, size)`` of slices on their raw grid: the border around them is cut off first."""
        top, left, height, width = self._inner(*grid.turned)
        return grid.back(scale_scores(scores[..., top : top + height, left : left + width], grid.turned))

    def restore_labels(self, maps: Tensor, grid: Grid) -> Tensor:
        """Maps ``(N, size, size)`` in the same way, each pixel from the one that it lies in."""
        top, left, height, width = self._inner(*grid.turned)
        return grid.back(nearest(maps[..., top : top + height, left : left + width], grid.turned))

    def ready(self, case: Case) -> Ready:
        """All slices ``(C, D, size, size)`` and their labels; a place is the number of a slice that shows a label."""
        image, label = self.show(case).image, case.label.to(torch.int16)
        if image.ndim == 3:
            image, label = image[:, None], label[None]
        else:
            label = label.movedim(self.axis, 0)
        top, left, height, width = self._inner(*label.shape[1:])
        square = np.full((len(label), self.size, self.size), OUTSIDE, np.int16)
        for number, plane in enumerate(label):
            square[number, top : top + height, left : left + width] = resize_label(plane, height, width).numpy()
        shown = [np.unique(plane) for plane in square]
        ids = {int(value) for values in shown for value in values}
        places = {i: _numbers(i in values for values in shown) for i in sorted(ids - {OUTSIDE, BACKGROUND, IGNORE})}
        if IGNORE in ids and ids - {OUTSIDE, IGNORE}:
            places[ANNOTATED] = _numbers(bool(set(values.tolist()) - {OUTSIDE, IGNORE}) for values in shown)
        return Ready(image.contiguous().numpy(), square, places)

    def cut(self, ready: Ready, seed: int) -> tuple[Tensor, Tensor]:
        """One slice: ``foreground`` of all show a label, the others are drawn from all slices."""
        draw = np.random.default_rng(derive_seed(seed, "place"))
        spot = self.spot(ready.places, draw)
        number = int(draw.integers(ready.label.shape[0])) if spot is None else int(spot[0])
        size = region_size(self.patch, self.augment)
        corner = [number, *((self.size - side) // 2 for side in size)]
        image = region(ready.image, corner, (1, *size), self.black)[:, 0]
        label = region(ready.label, corner, (1, *size), OUTSIDE)[0]
        return augmented(
            torch.from_numpy(image), torch.from_numpy(label), self.patch, self.augment, (), self.black, seed
        )

    def _window(self, case: Case) -> Tensor:
        """The raw image with each channel cut at its percentiles, then normalised, ``(channels, *S)``."""
        image = checked(case, (2, 3), self.accepted_channels)
        for channel in image:
            low, high = np.percentile(channel, self.intensity)
            channel -= low
            channel /= max(high - low, 1e-8)
        values = torch.from_numpy(image).clamp_(0, 1).expand(self.channels, *image.shape[1:])
        shape = (-1, *(1 for _ in image.shape[1:]))
        return (values - torch.tensor(self.mean).view(shape)) / torch.tensor(self.std).view(shape)

    def _inner(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of a slice of ``height`` × ``width`` within the square."""
        longer = max(height, width)
        inner = max(1, round(height * self.size / longer)), max(1, round(width * self.size / longer))
        return (self.size - inner[0]) // 2, (self.size - inner[1]) // 2, *inner

    def _square(self, images: Tensor) -> Tensor:
        """Images ``(..., C, h, w)`` in the middle of black squares."""
        top, left, height, width = self._inner(*images.shape[-2:])
        square = images.new_full((*images.shape[:-2], self.size, self.size), self.black)
        square[..., top : top + height, left : left + width] = resize(images, height, width)
        return square


def _numbers(chosen: object) -> np.ndarray[tuple[int, int], np.dtype[np.uint16]]:
    return np.flatnonzero(np.fromiter(chosen, bool)).astype(np.uint16)[:, None]  # type: ignore[call-overload]
