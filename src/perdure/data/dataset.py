"""A split of a source as a training or test set: names, a label table and a preparation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch.utils.data import Dataset as TorchDataset

from perdure.data.case import Case
from perdure.data.preparation import Preparation
from perdure.data.source import Source, Split
from perdure.errors import DataError
from perdure.labels import Table
from perdure.seeds import seeded


class Draw(NamedTuple):
    """Which sample to read: its position, the seed of its augmentation, and its source in a mix."""

    position: int
    seed: int = 0
    part: int = 0


class Samples(Protocol):
    """What batches are cut from: prepared cases by position and seed."""

    def __len__(self) -> int: ...

    def __getitem__(self, draw: Draw | int) -> Case: ...


@dataclass(frozen=True)
class Dataset(TorchDataset[Case]):
    """Samples of one split under one label table and one preparation.

    Args:
        source: Where cases are read.
        split: Which split of the source.
        names: The samples, in order.
        table: Label table of ``TABLE_SIZE`` entries: label of the source -> label of the stream.
        preparation: How a case becomes what the network sees.
        training: Augmented crops for training; otherwise whole images, with labels on the raw grid.
        check: Called before every read; raises when the task that owns the data is sealed.
        annotated: Ids that the labels can tell (after the table), see :class:`~perdure.data.case.Case`. Narrowed
            further by cases that state their own.
    """

    source: Source
    split: Split
    names: tuple[str, ...]
    table: Table
    preparation: Preparation
    training: bool = False
    check: Callable[[], None] | None = None
    annotated: frozenset[int] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, draw: Draw | int) -> Case:
        """Read, relabel and prepare one sample; the same draw always gives the same tensors."""
        position, seed, _ = draw if isinstance(draw, Draw) else Draw(draw)
        case = self.read(position)
        with seeded(seed):
            return self.preparation.train(case) if self.training else self.preparation.test(case)

    def read(self, position: int) -> Case:
        """A case as the source holds it, its labels in the stream's ids. Raises DataError where sizes disagree."""
        if self.check is not None:
            self.check()
        raw = self.source.read(self.split, self.names[position])
        if raw.label.ndim and raw.image.shape[1:] != raw.label.shape:
            raise DataError(
                f"{self.source.name}: image and mask of '{raw.name}' differ in size: "
                f"{tuple(raw.image.shape[1:])} and {tuple(raw.label.shape)}"
            )
        label = torch.from_numpy(self.table)[raw.label.long()]
        return Case(raw.image, label, raw.name, self._annotated(raw), raw.geometry, raw.group)

    def _annotated(self, raw: Case) -> frozenset[int] | None:
        if raw.annotated is None:
            return self.annotated
        own = frozenset(int(self.table[c]) for c in raw.annotated)
        return own if self.annotated is None else own & self.annotated


@dataclass(frozen=True)
class Joined(TorchDataset[Case]):
    """Datasets one after another as one: positions run through the first, then the second, and so on."""

    datasets: tuple[Dataset, ...]

    def __len__(self) -> int:
        return sum(map(len, self.datasets))

    def __getitem__(self, draw: Draw | int) -> Case:
        """Sample of the dataset that holds the position; a negative one counts from the end of the last."""
        position, seed, _ = draw if isinstance(draw, Draw) else Draw(draw)
        place = position + len(self) if position < 0 else position
        for dataset in self.datasets if place >= 0 else ():
            if place < len(dataset):
                return dataset[Draw(place, seed)]
            place -= len(dataset)
        raise IndexError(f"position {position} of {len(self)} samples")


def members(samples: Samples) -> Sequence[Dataset]:
    """The datasets that a set of samples is made of; none for samples that are no data set on their own."""
    if isinstance(samples, Joined):
        return samples.datasets
    return (samples,) if isinstance(samples, Dataset) else ()
