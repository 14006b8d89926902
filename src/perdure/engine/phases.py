"""A phase: one stage of a method's work on a task, as plain data. The engine runs it, a method describes it.

Three kinds are enough for all methods: :class:`Train` minimises a loss, :class:`Collect` adds up statistics in
one pass over data, :class:`Generate` makes numbered items (synthetic samples). What a phase needs is asked
for when it starts, so a later phase may use what an earlier one left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from perdure.data.case import Batch
from perdure.data.sampling import Batches, Mix
from perdure.engine.options import Precision
from perdure.engine.schedules import Schedule, constant
from perdure.engine.state import State

Terms = dict[str, Tensor]
"""Named, already weighted scalar loss terms; the engine minimises their sum and logs each."""


@dataclass(frozen=True)
class Train:
    """Minimise a loss.

    Args:
        name: Shown in progress, log and run folder.
        module: What is trained: its parameters with ``requires_grad`` get gradients, are averaged over
            processes and saved for resume. Train mode is set by the engine; a network that keeps parts of
            itself frozen says so in its own ``train`` method.
        data: Makes the batches at the start of the phase, of one source or a :class:`Mix` of several; ``None`` for a
            phase without data, whose loss is called with ``None``.
        loss: ``batch -> named weighted terms``.
        optimizer: Builds the optimiser at the start of the phase.
        schedule: Factor on every group's learning rate by step.
        epochs: Length in epochs of ``data``, or ``None`` if ``steps`` is given.
        steps: Length in optimiser steps.
        clip: Largest global gradient norm, or ``None``.
        ema: Decay of an exponential moving average of the parameters that replaces them at the end, or ``None``.
        accumulate: Batches per step.
        precision: Overrides the run's precision for this phase.
        after_step: Called with the step's number after each update (projection, pruning, bookkeeping).
        finish: Called once at the end.
    """

    name: str
    module: nn.Module
    loss: Callable[[Batch], Terms]
    optimizer: Callable[[], Optimizer]
    data: Callable[[], Batches | Mix] | None = None
    schedule: Schedule = constant
    epochs: int | None = None
    steps: int | None = None
    clip: float | None = None
    ema: float | None = None
    accumulate: int = 1
    precision: Precision | None = None
    after_step: Callable[[int], None] | None = None
    finish: Callable[[], None] | None = None


@dataclass(frozen=True)
class Collect:
    """One pass over data without gradients, in fp32 and evaluation mode, adding up sums.

    ``measure`` returns tensors that are *added* over batches, resumed runs and processes (so for given weights the
    totals do not depend on the number of processes, but for rounding where they are floats); ``finish`` receives the
    totals. Use float64 or int64 for long sums.
    """

    name: str
    module: nn.Module
    data: Callable[[], Batches | Mix]
    measure: Callable[[Batch], Mapping[str, Tensor]]
    finish: Callable[[dict[str, Tensor]], None]


class Progress(Protocol):
    """Where an item of a :class:`Generate` phase is worked on.

    Attributes:
        saved: What the last ``checkpoint`` before a stop handed over for saving; ``None`` for an item not begun.
    """

    saved: State | None

    def checkpoint(self, done: int, of: int, note: str, state: Callable[[], dict[str, object]]) -> None:
        """Show progress; save ``state()`` when that is due, and leave if a stop was asked for.

        Args:
            done: Steps of the item that are done; ``state()`` must suffice to go on after them.
            of: Steps in all, as far as known.
            note: A few words beside the bar.
            state: Tensors, numbers and containers of them.

        Raises:
            Interrupted: A stop was asked for; the state has been saved.
        """
        ...


@dataclass(frozen=True)
class Generate:
    """Make ``count`` numbered items; each is written to disk as it is done, so a killed run goes on with the next.

    An item that takes longer than some seconds calls :meth:`Progress.checkpoint` as it goes.

    Args:
        name: Shown in progress, log and folder names.
        module: Set to evaluation mode.
        count: Number of items.
        make: ``(index, progress) -> named tensors``.
        finish: Receives the files in order and takes what it needs.
        keep: For items that are memory themselves: their names are added to the method's ``files`` under this name
            before ``finish``. They are written to the run's store once and never copied; a method that replaces
            earlier ones empties the entry first. Without it items are deleted when the task is sealed.
        of: What the items show, such as an earlier task; follows the name in progress.
    """

    name: str
    module: nn.Module
    count: int
    make: Callable[[int, Progress], Mapping[str, Tensor]]
    finish: Callable[[Sequence[Path]], None] | None = None
    keep: str | None = None
    of: str | None = None


Phase = Train | Collect | Generate
