"""Exemplars: real training samples of earlier tasks, kept in files and replayed. They are raw training data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from perdure.data.case import Case
from perdure.data.dataset import Draw, Samples
from perdure.data.tensors import FileSamples
from perdure.engine.phases import Generate, Phase, Progress
from perdure.engine.state import Stateful
from perdure.errors import UsageError
from perdure.kept.items import Kept
from perdure.methods.options import Options
from perdure.methods.past import Judge, Mirrored
from perdure.seeds import derive_seed
from perdure.streams.task import Task

PREFIX: Final = "exemplars-"


class ExemplarOptions(Options):
    """Which training data stays."""

    per_task: int = Field(20, ge=1, description="training cases of each task that are kept, one sample of each")


@dataclass(frozen=True)
class _Noted:
    """What is known of a task: its name, the ids that it annotates, axes of mirroring, size of samples, and a seed."""

    name: str
    ids: tuple[int, ...]
    axes: tuple[int, ...]
    patch: tuple[int, ...]
    seed: int


class Exemplars:
    """Training samples of each task as the network sees them, one file each; see :class:`~perdure.methods.past.Past`.

    Args:
        options: How many are kept.
    """

    def __init__(self, options: ExemplarOptions) -> None:
        self.options = options
        self.tasks: list[_Noted] = []

    @property
    def taught(self) -> list[tuple[int, ...]]:
        """The classes that each task so far annotates, in learning order."""
        return [one.ids for one in self.tasks]

    def begin(self, task: Task) -> None:
        """Note the task. Raises UsageError where its samples have another size than those that are kept."""
        shown, ids = task.preparation, tuple(c for c in task.seen if c in task.annotated)
        # a run begins a task with the same seed whenever it is begun again: nothing has to be saved of it
        noted = _Noted(task.name, ids, shown.mirrors, tuple(shown.patch), torch.initial_seed())
        self.tasks = [*self.tasks[: task.index], noted]
        for one in self.tasks:
            if one.patch != noted.patch:
                sizes = ["×".join(map(str, size)) or "no fixed size" for size in (noted.patch, one.patch)]
                raise UsageError(
                    f"training samples of task '{task.name}' are {sizes[0]}, exemplars of task '{one.name}' {sizes[1]}",
                    "give all tasks samples of one size, or set method.replay=none",
                )

    def learn(self, owner: Stateful, task: Task) -> list[Phase]:
        """Store the exemplars: before training, so that too small a number shows at once."""
        samples, noted = task.train(), self.tasks[task.index]
        chosen: list[int] = []

        def draw(place: int) -> Case:
            return samples[Draw(place, derive_seed(noted.seed, "exemplar", place))]

        def make(index: int, progress: Progress) -> Mapping[str, Tensor]:  # noqa: ARG001
            if not chosen:
                chosen.extend(self._choose(samples, noted, draw))
            return _stored(draw(chosen[index]))

        count = min(self.options.per_task, len(samples))
        return [Generate("exemplars", owner, count, make, keep=_key(task.index))]

    def generate(self, owner: Stateful, task: Task, judge: Judge) -> list[Phase]:  # noqa: ARG002
        """No phases: nothing is made up."""
        return []

    def samples(self, owner: Stateful, task: Task) -> list[FileSamples]:
        """The exemplars of each earlier task."""
        return [
            FileSamples(owner.store.paths(owner.files[_key(k)]), Mirrored(axes=one.axes), frozenset(one.ids))
            for k, one in enumerate(self.tasks[: task.index])
        ]

    def replayed(self, owner: Stateful) -> int:
        """Exemplars of all earlier tasks."""
        return sum(len(owner.files[_key(k)]) for k in range(len(self.tasks) - 1))

    def kept(self, prefix: str) -> list[Kept]:  # noqa: ARG002
        """The exemplars of each task, as raw training data."""
        return [
            Kept(
                f"{PREFIX}{one.name}",
                "exemplars",
                (),
                f"real training samples of task {k + 1} with labels, cut and normalised as the network sees them, one "
                "from each of a few cases that lie evenly spread over the training set",
                files=_key(k),
            )
            for k, one in enumerate(self.tasks)
        ]

    def _choose(self, samples: Samples, noted: _Noted, draw: Callable[[int], Case]) -> list[int]:
        known: dict[int, frozenset[int]] = {}

        def shown(place: int) -> frozenset[int]:
            if place not in known:
                known[place] = frozenset(np.unique(draw(place).label.numpy()).tolist())
            return known[place]

        length = len(samples)
        places = choose(length, min(self.options.per_task, length), noted.seed % length, noted.ids, shown)
        if places is None:
            raise UsageError(
                f"{self.options.per_task} exemplars cannot show all {len(noted.ids)} classes of task '{noted.name}'",
                f"set method.exemplars.per_task={len(noted.ids)} or more",
            )
        return places


def choose(
    length: int, count: int, first: int, ids: Sequence[int], shown: Callable[[int], frozenset[int]]
) -> list[int] | None:
    """Places evenly spread over a set, some of them exchanged so that every class that the set shows is there.

    A sample makes way only if others show all of its classes, so that nothing is lost by it. There always is one where
    ``count`` is not below the number of classes. Other samples are looked at only while a class is missing.

    Args:
        length: Samples in the set.
        count: How many are chosen, at most ``length``.
        first: The first place.
        ids: The classes.
        shown: Labels in the sample at a place.

    Returns:
        Different places; ``None`` where so few samples do not show every class.
    """
    places = [(first + i * length // count) % length for i in range(count)]
    missing = set(ids).difference(*map(shown, places))
    for place in sorted(set(range(length)).difference(places)):
        if not missing:
            break
        if not shown(place) & missing:
            continue
        spare = next((p for p in reversed(places) if not _alone(p, places, ids, shown)), None)
        if spare is None:
            return None
        places[places.index(spare)] = place
        missing -= shown(place)
    return places


def _alone(place: int, places: Sequence[int], ids: Sequence[int], shown: Callable[[int], frozenset[int]]) -> bool:
    """Whether the sample at a place shows a class that no other chosen one shows."""
    return bool((shown(place) & set(ids)).difference(*(shown(p) for p in places if p != place)))


def _key(task: int) -> str:
    return f"{PREFIX}{task:02d}"


def _stored(case: Case) -> dict[str, Tensor]:
    """A sample as a file of :class:`~perdure.data.tensors.FileSamples`; labels take two bytes a pixel."""
    found = {"image": case.image.float(), "label": case.label.to(torch.int16)}
    if case.annotated is not None:
        found["annotated"] = torch.tensor(sorted(case.annotated), dtype=torch.int16)
    return found
