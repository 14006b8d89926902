"""Where the images that stand for old classes are made: all that a task replays, lot by lot."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.engine.phases import Progress
from perdure.methods.ccsi.memory import Memory
from perdure.methods.ccsi.synthesis import Request, SynthesisOptions, plan_groups, synthesise
from perdure.networks.classifier import Classifier


def frozen(network: Classifier) -> Classifier:
    """A copy that is in evaluation mode and never trained."""
    return copy.deepcopy(network).eval().requires_grad_(False)


@dataclass(frozen=True)
class ImpressionGenerator:
    """Makes the images that stand for the first classes of a memory.

    Args:
        options: How impressions are made.
        classes: Number of classes that images are made of.
        groups: Number of groups of impressions.
        seed: Of all that is random: equal studios with equal networks make equal images.
    """

    options: SynthesisOptions
    classes: int
    groups: int
    seed: int

    @property
    def lots(self) -> int:
        """Number of lots; each is optimised in one piece and saved when it is done."""
        return -(-self.groups // self.options.groups_at_once)

    def make(self, lot: int, teacher: Classifier, memory: Memory, progress: Progress) -> Mapping[str, Tensor]:
        """One lot: ``images (n, C, H, W)`` float32, ``labels (n,)`` channels, and how it ended by group.

        ``loss`` is the sum of all terms and ``steps`` the steps taken, ``(G,)`` each.
        """
        size = self.options.groups_at_once
        numbers = range(self.groups)[lot * size : (lot + 1) * size]
        means, moments = self._of(memory.means), memory.moments
        assert means is not None
        job = Request(
            targets=self._targets()[numbers.start : numbers.stop],
            numbers=numbers,
            seed=self.seed,
            means=means.float() / 255,
            moments=self._of(moments) if self.options.statistics == "class" else None,
        )
        made = synthesise(teacher, job, self.options, progress)
        loss = torch.stack(list(made.losses.values())).sum(0)
        return {"images": made.images, "labels": made.labels, "loss": loss, "steps": made.steps}

    def means_alone(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """Class means in the place of impressions, as often as there would be impressions; images and channels."""
        means = self._of(memory.means)
        assert means is not None
        targets = self._targets().flatten().to(means.device)
        return means[targets].float() / 255, targets

    def _targets(self) -> Tensor:
        return plan_groups(self.groups, self.classes, self.options, self.seed)

    def _of(self, rows: Tensor | None) -> Tensor | None:
        return None if rows is None else rows[: self.classes]
