"""A split of a source as a training or test set: names, a label table and a transform."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from perdure.data.source import Source, Split
from perdure.errors import DataError
from perdure.labels import Table
from perdure.seeds import seeded

Transform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Image ``(C, *S)`` uint8 or float32 and label ``(*S)`` or ``()`` uint8 -> image float32, label int64."""


class Draw(NamedTuple):
    """Which sample to read and the seed of its augmentation."""

    position: int
    seed: int


class Sample(NamedTuple):
    """Image ``(C, *S)`` float32, label ``(*S)`` int64 (or a scalar class id), and the sample's name."""

    image: Tensor
    label: Tensor
    name: str


class Batch(NamedTuple):
    """Images ``(N, C, *S)`` float32, labels ``(N, *S)`` or ``(N,)`` int64 in global ids, names.

    ``beside`` is a batch of a second data set that a phase asked for (``Train.beside``), else None.
    """

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]
    beside: Batch | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device."""
        beside = None if self.beside is None else self.beside.to(device)
        images, labels = self.images.to(device, non_blocking=True), self.labels.to(device, non_blocking=True)
        return Batch(images, labels, self.names, beside)


class Samples(Protocol):
    """What batches are cut from: samples by position and seed."""

    def __len__(self) -> int: ...

    def __getitem__(self, draw: Draw | int) -> Sample: ...


@dataclass(frozen=True)
class Dataset(TorchDataset[Sample]):
    """Samples of one split under one label table and one transform.

    Args:
        source: Where images and masks are read.
        split: Which split of the source.
        names: The samples, in order.
        table: Label table of ``TABLE_SIZE`` entries applied after the transform.
        transform: Geometry, augmentation and normalisation; draws from torch's generator only.
        check: Called before every read; raises when the task that owns the view is sealed.
    """

    source: Source
    split: Split
    names: tuple[str, ...]
    table: Table
    transform: Transform
    check: Callable[[], None] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, draw: Draw | int) -> Sample:
        """Read, transform and relabel one sample; the same draw always gives the same tensors."""
        position, seed = draw if isinstance(draw, tuple) else (draw, 0)
        if self.check is not None:
            self.check()
        name = self.names[position]
        image = torch.from_numpy(np.asarray(self.source.image(self.split, name), order="C"))
        mask = torch.from_numpy(np.asarray(self.source.mask(self.split, name), order="C"))
        if mask.ndim and image.shape[1:] != mask.shape:
            raise DataError(
                f"{self.source.name}: image and mask of '{name}' differ in size: "
                f"{tuple(image.shape[1:])} and {tuple(mask.shape)}"
            )
        with seeded(seed):
            image, label = self.transform(image, mask)
        return Sample(image, torch.from_numpy(self.table.astype(np.int64))[label], name)


@dataclass(frozen=True)
class Joined(TorchDataset[Sample]):
    """Views one after another as one set: positions run through the first, then the second, and so on."""

    views: tuple[Dataset, ...]

    def __len__(self) -> int:
        return sum(map(len, self.views))

    def __getitem__(self, draw: Draw | int) -> Sample:
        """Sample of the view that holds the position; a negative one counts from the end of the last view."""
        position, seed = draw if isinstance(draw, tuple) else (draw, 0)
        place = position + len(self) if position < 0 else position
        for view in self.views if place >= 0 else ():
            if place < len(view):
                return view[Draw(place, seed)]
            place -= len(view)
        raise IndexError(f"position {position} of {len(self)} samples")


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of equal size into a batch."""
    return Batch(
        torch.stack([s.image for s in samples]),
        torch.stack([s.label for s in samples]),
        tuple(s.name for s in samples),
    )
