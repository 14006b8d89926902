"""Which samples make up which step: pure functions of the run's seed, the step and the sample's place in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler

from perdure.data.dataset import Draw, Samples
from perdure.errors import UsageError
from perdure.seeds import derive_seed


@dataclass(frozen=True)
class Batches:
    """How samples are cut into batches.

    Args:
        samples: The data.
        size: Samples per step over *all* processes together.
        shuffle: New order every epoch, a function of the run's seed.
        drop_last: Leave out the last, smaller batch of an epoch.
        weights: Sampling weights, one per sample: draws with replacement, ``draws`` per epoch.
        draws: Samples per epoch when ``weights`` is given.
    """

    samples: Samples
    size: int
    shuffle: bool = True
    drop_last: bool = True
    weights: Tensor | None = None
    draws: int | None = None

    @property
    def parts(self) -> tuple[Batches, ...]:
        """Itself, as the only source of a :class:`Mix`."""
        return (self,)

    @property
    def per_epoch(self) -> int:
        """Samples of an epoch, before a last smaller batch is left out."""
        return self.draws if self.weights is not None and self.draws else len(self.samples)

    def steps(self) -> int:
        """Batches in one epoch: T of the papers. At least 1 unless there are no samples."""
        if self.drop_last and self.per_epoch >= self.size:
            return self.per_epoch // self.size
        return -(-self.per_epoch // self.size)

    @property
    def shortest(self) -> int:
        """Samples of a batch that is smaller than the others; 0 where there is none."""
        return self.per_epoch % self.size if self.per_epoch < self.size or not self.drop_last else 0

    def spans(self, step: int) -> list[tuple[int, range]]:
        """The samples of a step: an epoch, and places in its order."""
        epoch, within = divmod(step, self.steps())
        at = within * self.size
        return [(epoch, range(at, min(at + self.size, self.per_epoch)))]

    def order(self, seed: int, epoch: int) -> list[int]:
        """Positions of an epoch in the order in which they are drawn."""
        generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
        if self.weights is not None:
            return torch.multinomial(self.weights, self.per_epoch, replacement=True, generator=generator).tolist()
        if self.shuffle:
            return torch.randperm(len(self.samples), generator=generator).tolist()
        return list(range(len(self.samples)))


@dataclass(frozen=True)
class Share(Batches):
    """One of ``of`` sources that fill ``total`` places of every step between them, in turns.

    The places of all steps are numbered, and number n belongs to source n mod ``of``: every step is full, and no source
    is ever more than one sample ahead of another, also where ``total`` is no multiple of ``of``. Each source goes
    through its own samples again and again, and none is dropped at the end of an epoch.

    Args:
        place: Number of this source among the ``of`` ones; for ``size`` see :func:`shares`.
    """

    place: int = 0
    of: int = 1
    total: int = 1

    @property
    def shortest(self) -> int:
        """None is: a batch goes on in the next epoch."""
        return 0

    def spans(self, step: int) -> list[tuple[int, range]]:
        """The samples of a step, perhaps the end of one epoch and the beginning of the next."""
        first, last = (max(0, -(-(s * self.total - self.place) // self.of)) for s in (step, step + 1))
        length = self.per_epoch
        spans = []
        while first < last:
            epoch, at = divmod(first, length)
            stop = min(at + last - first, length)
            spans.append((epoch, range(at, stop)))
            first += stop - at
        return spans


def shares(sources: Sequence[Samples], total: int) -> tuple[Share, ...]:
    """Sources that fill ``total`` places of every step in equal shares, see :class:`Share`. None may be empty."""
    of = len(sources)
    return tuple(Share(samples, -(-total // of), place=k, of=of, total=total) for k, samples in enumerate(sources))


@dataclass(frozen=True)
class Mix:
    """Several sources with exact shares: every step has one batch of each, in this order, of its own size.

    Each source has epochs of its own and starts again when it is through, so that a small replay memory lasts as long
    as new data; one with fewer samples than its size gives all of them at every step. A step's samples carry the number
    of their source in ``batch.parts``.

    Args:
        parts: The sources; the first one decides how long an epoch is.
    """

    parts: tuple[Batches, ...]

    def steps(self) -> int:
        """Steps of an epoch: those of the first source."""
        return self.parts[0].steps()


class BatchSampler(Sampler[list[Draw]]):
    """Samples of the steps ``start .. stop - 1`` for one of ``world`` processes.

    Process r gets the r-th share of every source's part of a global batch, so n processes see together what one
    process with the same global batch would see, with the same augmentation.
    """

    def __init__(self, data: Batches | Mix, seed: int, start: int, stop: int, rank: int = 0, world: int = 1) -> None:
        self.parts = data.parts
        # the seed of the first source is the phase's own: one source draws the same alone and in a mix
        self.seeds = [seed if part == 0 else derive_seed(seed, "part", part) for part in range(len(self.parts))]
        self.start, self.stop, self.rank, self.world = start, stop, rank, world

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Draw]]:
        orders: list[dict[int, list[int]]] = [{} for _ in self.parts]  # of each part: by epoch, the order
        for step in range(self.start, self.stop):
            drawn: list[Draw] = []
            for part, (batches, seed) in enumerate(zip(self.parts, self.seeds, strict=True)):
                spans = batches.spans(step)
                if any(epoch not in orders[part] for epoch, _ in spans):
                    orders[part] = {epoch: batches.order(seed, epoch) for epoch, _ in spans}
                places = [(epoch, i) for epoch, span in spans for i in span]
                # shares are rounded up, so that a batch that does not divide leaves the last process the fewest
                share = -(-batches.size // self.world)
                mine = places[self.rank * share : (self.rank + 1) * share]
                # the place in the epoch and not the process seeds the augmentation: it is the same for any `world`
                drawn += [Draw(orders[part][epoch][i], derive_seed(seed, epoch, i), part) for epoch, i in mine]
            yield drawn


def check_shares(data: Batches | Mix, world: int) -> None:
    """Raise UsageError if a process would have to train on an empty share of some batch.

    Such a process would have no loss to take part with when gradients are averaged.
    """
    for batches in data.parts:
        smallest, share = batches.shortest, -(-batches.size // world)
        if 0 < smallest <= share * (world - 1):
            raise UsageError(
                f"a batch of {smallest} samples leaves one of {world} processes without any",
                "use fewer processes or a smaller training.batch_size",
            )
