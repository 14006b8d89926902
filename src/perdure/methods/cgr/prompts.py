"""What a task's images are called: one builder of prompts for real, replayed and sampled pairs (spec CGR 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from perdure.methods.cgr.codecs import Ends, members
from perdure.streams.task import Task

PREFIXES: Final[dict[str, str]] = {
    "cardiac": "A magnetic resonance of cardiac with",
    "fundus": "A fundus photography with",
    "prostate": "A magnetic resonance of",
}
"""The published prefixes, by the name of the task."""
MOST_CLASSES: Final = 8
"""Of one task. A mask is one grey channel, whose levels come closer with every class; and each subset has a prompt."""


@dataclass(frozen=True)
class Card:
    """What is known of a task without its data.

    Args:
        index: Position in the stream.
        name: Of the task.
        ids: Global ids of the local codes 1, 2, ...: the classes that it annotates, in learning order.
        prefix: How its prompts begin.
        phrases: How they call each class.
        ends: What black and white are in its prepared images.
        mirrors: Axes along which its training images are mirrored.
    """

    index: int
    name: str
    ids: tuple[int, ...]
    prefix: str
    phrases: tuple[str, ...]
    ends: Ends
    mirrors: tuple[int, ...] = ()

    @property
    def classes(self) -> int:
        """Number of its classes, background left out."""
        return len(self.ids)

    def prompt(self, subset: int) -> str:
        """The prompt of an image that shows these classes; without any, the prefix and a space."""
        return f"{self.prefix} " + ", ".join(self.phrases[code - 1] for code in members(subset))

    def full_prompt(self) -> str:
        """The published prompt of every generated pair, whatever its mask holds (defect Q13)."""
        *first, last = self.phrases
        return f"{self.prefix} " + " and ".join(filter(None, (", ".join(first), last)))

    def prompts(self) -> list[str]:
        """Those of all subsets: position s is that of subset s."""
        return [self.prompt(subset) for subset in range(1 << self.classes)]


def card(task: Task, prefixes: Mapping[str, str], phrases: Mapping[str, str]) -> Card:
    """The card of a task.

    Args:
        task: The task.
        prefixes: Task name -> prefix, besides the published ones.
        phrases: Class name -> phrase; "a" and the name where there is none.
    """
    ids = tuple(c for c in task.seen if c in task.annotated)
    prefix = {**PREFIXES, **prefixes}.get(task.name, f"An image of {_words(task.name)} with")
    names = [task.space.name(c) for c in ids] if len(task.space) else [f"class {c}" for c in ids]
    called = tuple(phrases.get(name, f"a {_words(name)}") for name in names)
    return Card(task.index, task.name, ids, prefix, called, task.preparation.ends, task.preparation.mirrors)


def draw_subsets(counts: Tensor, number: int) -> Tensor:
    """Subsets ``(number,)`` int64 as often as they were counted; draws from torch's generator on the CPU."""
    return torch.multinomial(counts.double().cpu(), number, replacement=True)


def rows(cards: Sequence[Card]) -> list[int]:
    """Where the rows of each task begin in tables over all tasks; the last entry is their length.

    A task with C classes has 2ᶜ + 1 rows: its subsets, and the published full prompt.
    """
    starts = [0]
    for one in cards:
        starts.append(starts[-1] + (1 << one.classes) + 1)
    return starts


def _words(name: str) -> str:
    return name.replace("_", " ").replace("-", " ")
