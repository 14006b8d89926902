"""A case and a batch: what a data set holds, and what a network trains on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from perdure.labels import BACKGROUND, IGNORE, TABLE_SIZE


@dataclass(frozen=True)
class Geometry:
    """Where the pixels of a case lie in the world.

    Volumes are read with their axes turned to one orientation, so that a model sees every patient alike: array axis 0
    runs from inferior to superior, 1 from posterior to anterior, 2 from left to right (RAS, last axis fastest, as
    nnU-Net's reorienting reader has it). ``affine`` and ``axes`` lead back to the file.

    Args:
        spacing: Distance of neighbouring pixels along each axis of the case; 1 where nothing is known.
        unit: Of the spacing, ``mm`` or ``px``; distances between surfaces are given in it.
        affine: ``4 × 4``, row by row: voxel indices of the *file*, in its own order of axes, to millimetres in RAS, as
            NIfTI has it; empty where the image is no volume.
        axes: For each axis of the case the axis of the file that it is, and whether it runs against it.
    """

    spacing: tuple[float, ...] = ()
    unit: str = "px"
    affine: tuple[float, ...] = ()
    axes: tuple[tuple[int, bool], ...] = ()


@dataclass(frozen=True)
class Grid:
    """How a prepared image lies in the raw image that it was made from: the way back for its scores.

    Args:
        size: Spatial size of the raw image; ``()`` where an image has one class.
        box: First and one past the last pixel along each raw axis of the part that was prepared; everything outside is
            background. Empty: all of the raw image.
        axes: For each axis of the prepared image the raw axis that it is. Empty: the same order.
    """

    size: tuple[int, ...]
    box: tuple[tuple[int, int], ...] = ()
    axes: tuple[int, ...] = ()

    @property
    def inside(self) -> tuple[int, ...]:
        """Raw size of the prepared part, in raw order."""
        return tuple(last - first for first, last in self.box) if self.box else self.size

    @property
    def turned(self) -> tuple[int, ...]:
        """The same in the order of the prepared axes."""
        return tuple(self.inside[axis] for axis in self.axes) if self.axes else self.inside

    def back(self, maps: Tensor) -> Tensor:
        """Maps ``(…, *turned)`` with their axes in raw order, ``(…, *inside)``."""
        if not self.axes:
            return maps
        lead = maps.ndim - len(self.axes)
        return maps.permute(*range(lead), *(lead + self.axes.index(axis) for axis in range(len(self.axes))))


@dataclass(frozen=True)
class Case:
    """One image with its label, as the data set holds it or as a network sees it.

    Args:
        image: ``(C, *S)``, uint8 or float32; prepared for a network it is float32.
        label: ``(*S)`` integer global ids, or one class ``()``. Where an image is prepared for prediction the label
            stays on the raw grid and may have another size than the image.
        name: Unique within its split.
        annotated: Ids that the label can hold. A class that is missing here may be in the image all the same, as
            background; ``None`` where every class of the stream that the image shows is labelled.
        geometry: Spacing of the raw grid.
        group: What must not be divided between splits, such as a patient; the name if there is nothing larger.
        grid: Of a case that was prepared for prediction: how it lies in the raw image.
    """

    image: Tensor
    label: Tensor
    name: str
    annotated: frozenset[int] | None = None
    geometry: Geometry = field(default_factory=Geometry)
    group: str = ""
    grid: Grid | None = None

    @property
    def size(self) -> tuple[int, ...]:
        """Spatial size of the label; ``()`` where the image has one class."""
        return tuple(self.label.shape)


def unlabelled(image: Tensor, whole: bool, geometry: Geometry | None = None, name: str = "") -> Case:
    """A case to predict: a raw image ``(C, *S)`` whose label nobody knows, all ``IGNORE``.

    Args:
        image: The image.
        whole: True where it has one class as a whole.
        geometry: Where its pixels lie, if known.
        name: For messages.
    """
    label = torch.tensor(IGNORE, dtype=torch.int16).expand(() if whole else image.shape[1:])
    return Case(image, label, name, geometry=geometry or Geometry())


class Batch(NamedTuple):
    """Samples of one step.

    Args:
        images: ``(N, C, *S)`` float32.
        labels: ``(N, *S)`` or ``(N,)`` int64 in global ids.
        names: Of the samples.
        parts: ``(N,)`` int64: which source of a :class:`~perdure.data.sampling.Mix` a sample came from; ``None`` where
            there is only one.
        annotated: ``(N, TABLE_SIZE)`` bool, see :func:`annotation_table`; ``None`` where every sample annotates all.
    """

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]
    parts: Tensor | None = None
    annotated: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device."""
        # not waiting overlaps the copy with the step before it, because the loader pins batches meant for a GPU
        images, labels = (t.to(device, non_blocking=True) for t in (self.images, self.labels))
        parts, annotated = (
            None if t is None else t.to(device, non_blocking=True) for t in (self.parts, self.annotated)
        )
        return Batch(images, labels, self.names, parts, annotated)

    def of(self, part: int) -> Batch:
        """The samples that came from one source of a mix, in order."""
        if self.parts is None:
            return self if part == 0 else self._replace(images=self.images[:0], labels=self.labels[:0], names=())
        return self.where(self.parts == part)

    def where(self, chosen: Tensor) -> Batch:
        """Some of the samples, in order. ``chosen``: ``(N,)`` bool."""
        names = tuple(name for name, here in zip(self.names, chosen.tolist(), strict=True) if here)
        parts, annotated = (None if t is None else t[chosen] for t in (self.parts, self.annotated))
        return Batch(self.images[chosen], self.labels[chosen], names, parts, annotated)


def annotation_table(annotated: Sequence[Iterable[int] | None]) -> Tensor | None:
    """Which labels each sample can tell, ``(N, TABLE_SIZE)`` bool; ``None`` if all samples annotate everything.

    Background and ignore are always True. An entry ``None`` means that the sample annotates every class.
    """
    if all(ids is None for ids in annotated):
        return None
    table = torch.zeros(len(annotated), TABLE_SIZE, dtype=torch.bool)
    for row, ids in zip(table, annotated, strict=True):
        if ids is None:
            row[:] = True
        else:
            row[[BACKGROUND, IGNORE, *ids]] = True
    return table


def collate(cases: Sequence[Case], parts: Sequence[int] | None = None) -> Batch:
    """Stack prepared cases of equal size into a batch; ``parts`` says which source of a mix each is from."""
    return Batch(
        torch.stack([case.image for case in cases]),
        torch.stack([case.label for case in cases]),
        tuple(case.name for case in cases),
        torch.tensor(parts if parts is not None else [0] * len(cases)),
        annotation_table([case.annotated for case in cases]),
    )
