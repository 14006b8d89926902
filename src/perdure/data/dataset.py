"""A split of a source as a training or test set: names, a label table and a preparation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

from perdure.data.case import Case
from perdure.data.preparation import Preparation
from perdure.data.source import Source, Split
from perdure.labels import BACKGROUND, IGNORE, Table
from perdure.seeds import seeded

if TYPE_CHECKING:
    from perdure.data.volumes.working import WorkingFiles


class Draw(NamedTuple):
    """Which sample to read: its position, the seed of its augmentation, and its source in a mix."""

    position: int
    seed: int = 0
    part: int = 0

    @classmethod
    def within(cls, draw: Draw | int, length: int) -> Draw:
        """A draw, or a position alone, as a draw from the start of ``length`` samples. Raises IndexError outside."""
        whole = draw if isinstance(draw, Draw) else cls(draw)
        place = whole.position + length if whole.position < 0 else whole.position
        if not 0 <= place < length:  # without IndexError, a plain loop over samples would never end
            raise IndexError(f"position {whole.position} of {length} samples")
        return whole._replace(position=place)


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
        working: Where training samples are cut from, if the preparation has made them
            (:attr:`~perdure.data.preparation.Preparation.needs_working_files`).
    """

    source: Source
    split: Split
    names: tuple[str, ...]
    table: Table
    preparation: Preparation
    training: bool = False
    check: Callable[[], None] | None = None
    annotated: frozenset[int] | None = None
    working: WorkingFiles | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, draw: Draw | int) -> Case:
        """Read, relabel and prepare one sample; the same draw always gives the same tensors."""
        position, seed, _ = Draw.within(draw, len(self.names))
        if self.training and self.working is not None:
            self._refuse_if_sealed()
            # classes of the source that the stream does not teach here are background: no sample is centred on them
            taught = np.flatnonzero((self.table != BACKGROUND) & (self.table != IGNORE)).tolist()
            raw = self.working.sample(self.names[position], self.preparation, seed, frozenset(taught))
            sample = self._relabelled(raw)
            return replace(sample, label=sample.label.long())
        case = self.read(position)
        with seeded(seed):  # here and not in the loader: the sample is then the same for any number of workers
            return self.preparation.train(case) if self.training else self.preparation.test(case)

    def read(self, position: int) -> Case:
        """A case as the source holds it, its labels in the stream's ids. Raises DataError where sizes disagree."""
        self._refuse_if_sealed()
        raw = self.source.read(self.split, self.names[position])
        if raw.label.ndim and raw.image.shape[1:] != raw.label.shape:
            raise self.source.size_error(self.split, self.names[position], raw.image.shape[1:], raw.label.shape)
        return self._relabelled(raw)

    def _refuse_if_sealed(self) -> None:
        if self.check is not None:
            self.check()

    def _relabelled(self, raw: Case) -> Case:
        """A case of the source with its labels, and the ids that it annotates, in those of the stream."""
        label = torch.from_numpy(self.table)[raw.label.long()]
        annotated = self.annotated
        if raw.annotated is not None:  # a case states its own ids in those of the source
            own = frozenset(int(self.table[c]) for c in raw.annotated)
            annotated = own if annotated is None else own & annotated
        return Case(raw.image, label, raw.name, annotated, raw.geometry, raw.group)


@dataclass(frozen=True)
class Joined(TorchDataset[Case]):
    """Datasets one after another as one: positions run through the first, then the second, and so on."""

    datasets: tuple[Dataset, ...]

    def __len__(self) -> int:
        return sum(map(len, self.datasets))

    def __getitem__(self, draw: Draw | int) -> Case:
        """Sample of the dataset that holds the position; a negative one counts from the end of the last."""
        place, seed, _ = Draw.within(draw, len(self))
        number = 0
        while place >= len(self.datasets[number]):
            place -= len(self.datasets[number])
            number += 1
        return self.datasets[number][Draw(place, seed)]


def members(samples: Samples) -> Sequence[Dataset]:
    """The datasets that a set of samples is made of; none for samples that are no data set on their own."""
    if isinstance(samples, Joined):
        return samples.datasets
    return (samples,) if isinstance(samples, Dataset) else ()
