"""What a generator knows of each task besides its weights: prompts, and counts of what masks show."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from perdure.data.case import Batch
from perdure.errors import PerdureError
from perdure.files import home
from perdure.methods.cgr import codecs
from perdure.methods.cgr.options import GeneratorOptions
from perdure.methods.cgr.prompts import Card, card, draw_subsets, rows
from perdure.methods.cgr.sampling import BINS, area_bins
from perdure.networks.joint_diffusion.text import TOKENS, clip_embeddings, hash_embeddings
from perdure.streams.task import Task

COUNTS: Final = ("subsets", "areas", "sides", "grey")


class Knowledge(nn.Module):
    """Tables over all tasks so far.

    ``subsets (R,)`` int64 says how often each set of classes was seen, ``texts (R, T · width)`` float16 holds the
    embedded prompts, ``areas (ΣC, 64)`` int64 the areas of classes by size, ``sides (T, 2)`` int64 height and width,
    ``grey (T,)`` bool whether images are grey. A task with C classes has 2ᶜ + 1 rows R: its subsets, and the published
    full prompt.

    Args:
        options: Of the generator.

    Attributes:
        cards: One per task.
    """

    subsets: Tensor
    texts: Tensor
    areas: Tensor
    sides: Tensor
    grey: Tensor

    def __init__(self, options: GeneratorOptions) -> None:
        super().__init__()
        self.options = options
        self.cards: list[Card] = []
        tokens = options.tokens if options.text == "hash" else TOKENS
        for name, shape, kind in (
            ("subsets", (0,), torch.int64),
            ("texts", (0, tokens * options.text_width), torch.float16),
            ("areas", (0, BINS), torch.int64),
            ("sides", (0, 2), torch.int64),
            ("grey", (0,), torch.bool),
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=kind))

    def begin(self, task: Task) -> None:
        """Write the task's card."""
        self.cards = [*self.cards[: task.index], card(task, self.options.prefixes, self.options.phrases)]

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """What images and masks of the present task show; sums over batches add up."""
        one, images = self.cards[-1], batch.images
        codes = codecs.to_local(batch.labels, one.ids)
        shown = codecs.subsets(codes, one.classes)
        return {
            "subsets": torch.bincount(shown, minlength=(1 << one.classes) + 1),
            "areas": area_bins(codes, one.classes),
            "sides": torch.tensor(images.shape[2:], device=images.device) * len(images),
            "images": torch.tensor(len(images), device=images.device),
        }

    def keep(self, sums: dict[str, Tensor], grey: bool) -> None:
        """Take in the sums and whether images are grey, and encode the prompts of all subsets of the task's classes.

        Raises:
            PerdureError: No image shows a class.
        """
        one, counts = self.cards[-1], sums["subsets"].clone()
        if self.options.empty == "drop":
            counts[0] = 0
        if not int(counts.sum()):
            raise PerdureError(
                f"task '{one.name}': no training image shows a class that it annotates", "check its masks"
            )
        before = self.cards[:-1]
        first, classes, tasks = rows(before)[-1], sum(card.classes for card in before), len(before)
        self.subsets = _with(self.subsets, first, counts)
        self.texts = _with(self.texts, first, self._embedded([*one.prompts(), one.full_prompt()]))
        self.areas = _with(self.areas, classes, sums["areas"])
        self.sides = _with(self.sides, tasks, (sums["sides"] // sums["images"])[None])
        self.grey = _with(self.grey, tasks, torch.tensor([grey]))

    def _embedded(self, prompts: list[str]) -> Tensor:
        options = self.options
        if options.text == "hash":
            text = hash_embeddings(prompts, options.text_width, options.tokens)
        else:
            assert options.text_folder is not None  # asked for before the task's first phase
            text = clip_embeddings(prompts, home(options.text_folder), options.text_width)
        return text.flatten(1).half()

    def places(self, one: Card, subsets: Tensor) -> Tensor:
        """Rows of the prompts of a task's subsets ``(N,)``."""
        return subsets + rows(self.cards)[one.index]

    def text(self, places: Tensor) -> Tensor:
        """Embedded prompts ``(N, T, width)`` float32 of rows ``(N,)``."""
        return self.texts[places].float().view(len(places), -1, self.options.text_width)

    def draw(self, one: Card, number: int) -> Tensor:
        """Subsets of a task ``(number,)`` int64, on the CPU, as often as they were seen."""
        first = rows(self.cards)[one.index]
        return draw_subsets(self.subsets[first : first + (1 << one.classes)], number)

    def areas_of(self, one: Card) -> Tensor:
        """Areas of a task's classes by size, ``(classes, 64)``."""
        first = sum(card.classes for card in self.cards[: one.index])
        return self.areas[first : first + one.classes]


def _with(table: Tensor, kept: int, more: Tensor) -> Tensor:
    """The first rows of a table, then others: a phase that is done again replaces what it wrote."""
    return torch.cat([table[:kept], more.to(table)])
