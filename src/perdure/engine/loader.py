"""Reading the samples of a phase, in this process or in workers."""

from __future__ import annotations

import atexit
import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from perdure.data.case import Case
from perdure.data.dataset import Draw, Samples, members
from perdure.data.sampling import Batches, BatchSampler
from perdure.errors import DataError, PerdureError, UsageError

T = TypeVar("T")


def read_cases(samples: Samples, at_once: int, workers: int, rank: int, world: int) -> Iterator[list[Case]]:
    """All samples in order, some at a time, this process's share of them; images may differ in size."""
    batches = Batches(samples, at_once * world, shuffle=False, drop_last=False)
    for cases in read_draws(BatchSampler(batches, 0, 0, batches.steps(), rank, world), lambda cases, _: cases, workers):
        yield cases or []


def read_draws(
    draws: BatchSampler,
    gather: Callable[[list[Case], list[int]], T],
    workers: int,
    pin: bool = False,
    context_seed: int = 0,
) -> Iterator[T | None]:
    """Read the draws step by step.

    A sample that a worker process cannot read raises its error here. Worker processes start anew for each phase; an
    archive that is read when it is first needed is read here before, once for all of them.

    Args:
        draws: The steps.
        gather: Makes what a step gives of its cases and the numbers of their sources, where they are read; a step of
            which this process has no share gives ``None``.
        workers: Processes that read; 0 for this one.
        pin: Copy tensors into pinned memory, for a GPU.
        context_seed: Seeds the workers' own generators. Samples do not depend on it: they carry a seed each.

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
    for dataset in (dataset for source in sources for dataset in members(source) if workers and len(dataset)):
        with contextlib.suppress(PerdureError):  # a worker reports it, if one reads this sample
            dataset[0]
    loader = DataLoader(
        _Steps(sources, gather),
        sampler=draws,
        batch_size=None,  # an entry of the data set is a whole step
        collate_fn=lambda step: step,
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator().manual_seed(context_seed),
        worker_init_fn=_start_worker if workers else None,
        # forked workers share what is in memory already; spawned ones would import torch and read archives again
        multiprocessing_context="fork" if workers else None,
    )
    return _reads(loader)


@dataclass(frozen=True)
class _Steps(TorchDataset[T | PerdureError | None], Generic[T]):
    """Whole steps by their draws. Errors are handed over and not raised: torch would add a worker's traceback."""

    sources: Sequence[Samples]
    gather: Callable[[list[Case], list[int]], T]

    def __getitem__(self, draws: list[Draw]) -> T | PerdureError | None:
        try:
            cases = [self.sources[draw.part][draw] for draw in draws]
        except PerdureError as error:
            return error
        return self.gather(cases, [draw.part for draw in draws]) if cases else None


def _reads(loader: DataLoader[T | PerdureError | None]) -> Iterator[T | None]:
    reads = iter(loader)
    # Workers ignore SIGTERM, so Python's own way of ending them at exit would wait for ever.
    end_workers: Callable[[], None] | None = reads._shutdown_workers if loader.num_workers else None  # type: ignore[attr-defined]
    if end_workers is not None:
        atexit.register(end_workers)
    try:
        for step in reads:
            if isinstance(step, PerdureError):
                raise step
            yield step
    finally:
        if end_workers is not None:
            atexit.unregister(end_workers)
            end_workers()


def _start_worker(worker: int) -> None:  # noqa: ARG001
    """One thread per worker, and no reaction to a stop that is sent to the whole process group.

    The main process saves first and then ends its workers itself, so they must go on reading until then.
    """
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
