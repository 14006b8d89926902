"""Which samples make up which step: a pure function of the run's seed, not of what happened before."""

from __future__ import annotations

import atexit
import contextlib
import signal
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from perdure.data.dataset import Batch, Draw, Joined, Sample, Samples, collate
from perdure.engine.phases import Batches
from perdure.errors import DataError, PerdureError, UsageError
from perdure.seeds import derive_seed


class BatchSampler(Sampler[list[Draw]]):
    """Samples of the steps ``start .. stop - 1`` for one of ``world`` processes.

    Process r gets the r-th share of every global batch, so n processes see together what one process with
    the same global batch would see, with the same augmentation.
    """

    def __init__(self, batches: Batches, seed: int, start: int, stop: int, rank: int = 0, world: int = 1) -> None:
        self.batches, self.seed, self.start, self.stop = batches, seed, start, stop
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Draw]]:
        per_epoch, size = self.batches.steps(), self.batches.size
        share = -(-size // self.world)
        epoch, order = -1, [0]
        for step in range(self.start, self.stop):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = self._order(epoch)
            at = (step % per_epoch) * size
            mine = range(at + self.rank * share, min(at + size, at + (self.rank + 1) * share, len(order)))
            yield [Draw(order[i], derive_seed(self.seed, epoch, i)) for i in mine]

    def _order(self, epoch: int) -> list[int]:
        batches = self.batches
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
        if batches.weights is not None:
            count = batches.draws or len(batches.view)
            return torch.multinomial(batches.weights, count, replacement=True, generator=generator).tolist()
        if batches.shuffle:
            return torch.randperm(len(batches.view), generator=generator).tolist()
        return list(range(len(batches.view)))


def make_loader(draws: BatchSampler, workers: int, pin: bool, context_seed: int = 0) -> Iterator[Batch | None]:
    """Read the draws; the batches are :class:`Batch`, or ``None`` where this process has no share.

    What a worker process finds wrong with a sample is raised here as it was raised there. Worker processes start
    anew for each phase; an archive that is read when it is first needed is read here before, once for all of them.

    Raises:
        DataError: The view is empty.
        UsageError: The batch cannot be shared evenly by the processes.
    """
    batches = draws.batches
    if not len(batches.view):
        raise DataError(
            "a training or test set is empty",
            "run `perdure check` on the recipe to see the images of each task",
        )
    if draws.world > 1 and batches.size % draws.world:
        raise UsageError(
            f"a batch of {batches.size} cannot be shared by {draws.world} processes",
            f"choose a batch size that is a multiple of {draws.world}",
        )
    if workers:
        _read_ahead(batches.view)
    generator = torch.Generator().manual_seed(context_seed)  # workers' base seeds; samples carry their own
    loader = DataLoader(
        _Told(batches.view),
        batch_sampler=draws,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin,
        generator=generator,
        worker_init_fn=_start_worker if workers else None,
        multiprocessing_context="fork" if workers else None,
    )
    return _reads(loader)


def _read_ahead(samples: Samples) -> None:
    """Read a sample of each view, so that what its source loads once is in memory when workers are forked."""
    views = [view for view in samples.views if len(view)] if isinstance(samples, Joined) else [samples]
    for view in views:
        # a worker tells what is wrong with a sample, if one reads it
        with contextlib.suppress(PerdureError):
            view[0]


def _reads(loader: DataLoader[Sample | PerdureError]) -> Iterator[Batch | None]:
    reads = iter(loader)
    # Workers do not heed SIGTERM, so Python's own way of ending them at exit would wait for ever.
    stop: Callable[[], None] = reads._shutdown_workers if loader.num_workers else _nothing  # type: ignore[attr-defined]
    atexit.register(stop)
    try:
        for batch in reads:
            if isinstance(batch, PerdureError):
                raise batch
            yield batch
    finally:
        atexit.unregister(stop)
        stop()


def _nothing() -> None:
    pass


class _Told(TorchDataset["Sample | PerdureError"]):
    """A view that hands errors over instead of raising them: torch would put a traceback into their text."""

    def __init__(self, view: Samples) -> None:
        self.view = view

    def __getitem__(self, draw: Draw) -> Sample | PerdureError:
        try:
            return self.view[draw]
        except PerdureError as error:
            return error


def check_shares(batches: Batches, world: int) -> None:
    """Raise UsageError if a process would have to train on an empty share of some batch."""
    count = batches.draws if batches.weights is not None and batches.draws else len(batches.view)
    smallest = count % batches.size if count < batches.size or not batches.drop_last else 0
    share = -(-batches.size // world)
    if 0 < smallest <= share * (world - 1):
        raise UsageError(
            f"a batch of {smallest} samples leaves one of {world} processes without any",
            "use fewer processes or a smaller training.batch_size",
        )


def _start_worker(worker: int) -> None:  # noqa: ARG001
    """One thread a worker; a stop that is sent to the whole process group is the main process's business.

    It saves first and then ends its workers by itself, so they must go on reading until then.
    """
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _collate(samples: list[Sample | PerdureError]) -> Batch | PerdureError | None:
    wrong = next((sample for sample in samples if isinstance(sample, PerdureError)), None)
    if wrong is not None or not samples:
        return wrong
    return collate([sample for sample in samples if not isinstance(sample, PerdureError)])
