"""Class impressions as the past of any method for 2D segmentation; see :class:`~perdure.methods.past.Past`."""

from __future__ import annotations

import torch
from pydantic import Field

from perdure.data.dataset import Joined, Samples, members
from perdure.data.sampling import Batches
from perdure.data.tensors import tensor_view
from perdure.engine.phases import Phase
from perdure.engine.state import Stateful
from perdure.kept.items import Kept
from perdure.methods.ccsi_seg.impressions import SynthesisOptions
from perdure.methods.ccsi_seg.memory import ImpressionMemory
from perdure.methods.ccsi_seg.statistics import decode
from perdure.methods.past import LOOKS, Judge
from perdure.networks.segmenter import Segmenter
from perdure.streams.task import Task


class ImpressionOptions(SynthesisOptions):
    """How impressions are made, and what is kept for them."""

    confidence: float = Field(
        0.5,
        ge=0.5,
        lt=1,
        description="least certainty of the teacher to label a pixel; 0.5: every pixel has a label",
    )
    patch: int = Field(32, ge=4, description="side of the mean patches in pixels")
    previews: int = Field(4, ge=0, description="impressions per class shown in the report")


class ClassImpressions(torch.nn.Module):
    """Statistics of each class; impressions of all old classes are made before a later task trains.

    Args:
        options: How they are made.
        network: The method's network, from which they are made. Not a part of this one: its weights are the method's.
    """

    def __init__(self, options: ImpressionOptions, network: Segmenter) -> None:
        super().__init__()
        self.options, self._network = options, (network,)
        self.memory = ImpressionMemory(network, options, options.patch, options.previews)
        self.taught: tuple[tuple[int, ...], ...] = ()

    def begin(self, task: Task) -> None:
        """Freeze a copy of the network."""
        self.memory.begin(task, *self._network)
        present = tuple(c for c in task.seen if c in task.annotated)
        self.taught = (task.old, present) if task.old else (present,)

    def learn(self, owner: Stateful, task: Task) -> list[Phase]:  # noqa: ARG002
        """Make impressions of the old classes; of the task, nothing is taken in yet."""
        return [self.memory.generate()] if self.memory.old else []

    def generate(self, owner: Stateful, task: Task, judge: Judge) -> list[Phase]:  # noqa: ARG002
        """Measure the task's classes with the trained network."""
        passes = -(-LOOKS // len(task.train()))

        def looks() -> Batches:
            return Batches(Joined(tuple(members(task.train())) * passes), 8, shuffle=False, drop_last=False)

        return [self.memory.collect(task, *self._network, self.options.confidence, looks, passes)]

    def samples(self, owner: Stateful, task: Task) -> list[Samples]:  # noqa: ARG002
        """Impressions, of all earlier tasks together."""
        memory = self.memory
        if memory.images is None or memory.labels is None:
            return []
        return [tensor_view(decode(memory.images, memory.statistics.ends), memory.labels, task.space)]

    def replayed(self, owner: Stateful) -> int:  # noqa: ARG002
        """Impressions that the present task trains on."""
        return self.memory.replayed

    def kept(self, prefix: str) -> list[Kept]:
        """Mean patches and masks, and statistics."""
        return self.memory.kept(f"{prefix}memory.")
