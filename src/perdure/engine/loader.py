"""Reading the samples of a phase, in this process or in workers."""

from __future__ import annotations

import atexit
import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from perdure.data.case import Batch, Case, collate
from perdure.data.dataset import Draw, Samples, members
from perdure.data.sampling import Batches, BatchSampler
from perdure.errors import DataError, PerdureError, UsageError

Read = tuple[int, Case | PerdureError]
"""A sample and the source of a mix that it is from, or what is wrong with it."""
T = TypeVar("T")


def make_loader(draws: BatchSampler, workers: int, pin: bool, context_seed: int = 0) -> Iterator[Batch | None]:
    """Read the draws as batches of equal size, or ``None`` where this process has no share; see :func:`read_draws`."""
    return read_draws(draws, workers, _stack, pin, context_seed)


def read_cases(samples: Samples, at_once: int, workers: int, rank: int, world: int) -> Iterator[list[Case]]:
    """All samples in order, some at a time, this process's share of them; images may differ in size."""
    batches = Batches(samples, at_once * world, shuffle=False, drop_last=False)
    for cases in read_draws(BatchSampler(batches, 0, 0, batches.steps(), rank, world), workers, _list):
        yield cases or []


def read_draws(
    draws: BatchSampler,
    workers: int,
    gather: Callable[[list[Case], list[int]], T],
    pin: bool = False,
    context_seed: int = 0,
) -> Iterator[T | None]:
    """Read the draws; each step gives what ``gather`` makes of its cases, ``None`` where there are none.

    What a worker process finds wrong with a sample is raised here as it was raised there. Worker processes start
    anew for each phase; an archive that is read when it is first needed is read here before, once for all of them.

    Raises:
        DataError: A source is empty.
        UsageError: The batch cannot be shared evenly by the processes.
    """
    sources = [batches.samples for batches in draws.parts]
    if not all(map(len, sources)):
        raise DataError(
            "a training or test set is empty",
            "run `perdure check` on the recipe to see the images of each task",
        )
    uneven = [batches.size for batches in draws.parts if batches.size % draws.world]
    if uneven:
        raise UsageError(
            f"a batch of {uneven[0]} cannot be shared by {draws.world} processes",
            f"choose a batch size that is a multiple of {draws.world}",
        )
    if workers:
        _read_ahead(sources)
    generator = torch.Generator().manual_seed(context_seed)  # workers' base seeds; samples carry their own
    loader = DataLoader(
        _Told(sources),
        batch_sampler=draws,
        num_workers=workers,
        collate_fn=partial(_collate, gather),
        pin_memory=pin,
        generator=generator,
        worker_init_fn=_start_worker if workers else None,
        multiprocessing_context="fork" if workers else None,
    )
    return _reads(loader)


def _read_ahead(sources: Sequence[Samples]) -> None:
    """Read a sample of each data set, so that what it loads once is in memory when workers are forked."""
    for samples in (dataset for source in sources for dataset in members(source) if len(dataset)):
        # a worker tells what is wrong with a sample, if one reads it
        with contextlib.suppress(PerdureError):
            samples[0]


def _reads(loader: DataLoader[Read]) -> Iterator[Any]:
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


class _Told(TorchDataset[Read]):
    """Samples of several sources that hand errors over instead of raising them: torch would add a traceback."""

    def __init__(self, sources: Sequence[Samples]) -> None:
        self.sources = sources

    def __getitem__(self, draw: Draw) -> Read:
        try:
            return draw.part, self.sources[draw.part][draw]
        except PerdureError as error:
            return draw.part, error


def _start_worker(worker: int) -> None:  # noqa: ARG001
    """One thread a worker; a stop that is sent to the whole process group is the main process's business.

    It saves first and then ends its workers by itself, so they must go on reading until then.
    """
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _stack(cases: list[Case], parts: list[int]) -> Batch:
    return collate(cases, parts)


def _list(cases: list[Case], parts: list[int]) -> list[Case]:  # noqa: ARG001
    return cases


def _collate(gather: Callable[[list[Case], list[int]], T], samples: list[Read]) -> T | PerdureError | None:
    """A step's cases, or the first thing that was wrong; ``None`` where this process has no share of the step."""
    cases: list[Case] = []
    for _, sample in samples:
        if isinstance(sample, PerdureError):
            return sample
        cases.append(sample)
    return gather(cases, [part for part, _ in samples]) if cases else None
