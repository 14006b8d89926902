"""The past as a part of a method: labelled samples of earlier tasks, where they come from, and what it keeps for them.

A method that replays samples owns one :class:`Past` and knows no more of it: whether a generator makes the samples or
files hold them is a setting (:mod:`perdure.methods.replay`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor

from perdure.data.case import Batch, Case, annotation_table
from perdure.data.dataset import Samples
from perdure.data.preparation import Preparation
from perdure.data.sampling import Batches, Mix, shares
from perdure.engine.phases import Phase
from perdure.engine.state import Stateful
from perdure.errors import UsageError
from perdure.kept.items import Kept
from perdure.streams.task import Task

LOOKS: Final = 256
"""Training samples that statistics of a task are taken from, at least: of volumes each one is a slice at random."""


class Judge(NamedTuple):
    """The trained method, as far as generated samples are judged by it.

    Args:
        features: Prepared images ``(N, C, H, W)`` -> vectors ``(N, d)``, where copies of real images are looked for.
        labels: Prepared images -> global ids ``(N, H, W)``: whether masks fit their images.
    """

    features: Callable[[Tensor], Tensor]
    labels: Callable[[Tensor], Tensor]


class Past(Protocol):
    """Samples of earlier tasks. ``owner`` is the method, whose files they are."""

    @property
    def taught(self) -> Sequence[tuple[int, ...]]:
        """Ids that labels of each source of samples can tell, those of the present task last; empty without a past."""
        ...

    def begin(self, task: Task) -> None:
        """Note what later tasks have to know of this one, before the network grows. Reads no data."""
        ...

    def learn(self, owner: Stateful, task: Task) -> list[Phase]:
        """Take in the task's data, or make samples of earlier tasks, before the method trains."""
        ...

    def generate(self, owner: Stateful, task: Task, judge: Judge) -> list[Phase]:
        """Make samples for later tasks, or what they are made from, after the method has trained."""
        ...

    def samples(self, owner: Stateful, task: Task) -> Sequence[Samples]:
        """Samples of earlier tasks as training sees them: a source per task, in task order, or one in all."""
        ...

    def replayed(self, owner: Stateful) -> int:
        """How many samples the present task trains on."""
        ...

    def kept(self, prefix: str) -> list[Kept]:
        """What crosses the task boundary; ``prefix`` is where this part is in its owner, with a dot."""
        ...


class Nothing:
    """No past: the method sees the present task alone."""

    taught: tuple[tuple[int, ...], ...] = ()

    def begin(self, task: Task) -> None:
        """Nothing to note."""

    def learn(self, owner: Stateful, task: Task) -> list[Phase]:  # noqa: ARG002
        """No phases."""
        return []

    def generate(self, owner: Stateful, task: Task, judge: Judge) -> list[Phase]:  # noqa: ARG002
        """No phases."""
        return []

    def samples(self, owner: Stateful, task: Task) -> list[Samples]:  # noqa: ARG002
        """No samples."""
        return []

    def replayed(self, owner: Stateful) -> int:  # noqa: ARG002
        """None."""
        return 0

    def kept(self, prefix: str) -> list[Kept]:  # noqa: ARG002
        """Nothing."""
        return []


class Mirrored(Preparation):
    """Stored samples as the network sees them, every other time mirrored along one axis.

    Attributes:
        axes: Axes along which the task's own training images are mirrored too.
    """

    axes: tuple[int, ...] = ()

    def train(self, case: Case) -> Case:
        """Image ``(C, *S)`` float32 and label ``(*S)`` or ``()`` int64."""
        image, label = case.image.float(), case.label.long()
        if self.axes and torch.rand(()).item() < 0.5:
            axis = self.axes[int(torch.randint(len(self.axes), ()))]
            image, label = image.flip(axis + 1), label.flip(axis) if label.ndim else label
        return replace(case, image=image.contiguous(), label=label.contiguous())


def need_room(batch_size: int) -> None:
    """Raise UsageError where a batch has no room for a real and a replayed sample."""
    if batch_size < 2:
        raise UsageError("a batch of 1 cannot hold a real and a replayed sample", "set training.batch_size=2 or more")


def halves(batch_size: int, past: int) -> tuple[int, int]:
    """Real and replayed samples of a batch: half and half, an odd one is real; all real where there is no past."""
    replayed = batch_size // 2 if past else 0
    return batch_size - replayed, replayed


def mixed(task: Task, past: Sequence[Samples], batch_size: int) -> Batches | Mix:
    """Training data of a task, half of each batch replayed; part k of the mix is source k of the past, from 1."""
    real, replayed = halves(batch_size, len(past))
    data = Batches(task.train(), size=real, shuffle=True, drop_last=True)
    return Mix((data, *shares(past, replayed))) if past else data


def told(batch: Batch, past: Past) -> Batch:
    """A batch whose samples say which classes their labels can tell: those of the source that each is from."""
    if batch.parts is None or not past.taught:
        return batch
    *earlier, present = past.taught
    table = annotation_table([present, *earlier])
    assert table is not None
    own = table.to(batch.parts.device)[batch.parts]
    return batch._replace(annotated=own if batch.annotated is None else own & batch.annotated)
