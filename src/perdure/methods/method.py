"""What a method is. There is no base class: any ``nn.Module`` with these members is a method.

Being a module is the whole of its memory: parameters and buffers are saved when a task is sealed and in the
middle of a phase, and restored from there. Frozen copies of earlier networks are made again in ``begin``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from pydantic import BaseModel
from torch import Tensor

from perdure.data.source import Kind
from perdure.engine.phases import Phase
from perdure.kept.items import Kept
from perdure.streams.task import Task


@dataclass(frozen=True)
class Prediction:
    """Scores a model gives its classes at every position.

    Args:
        scores: ``(N, K, *S)``, or ``(N, K)`` in classification, comparable over channels; the highest wins.
            Averaging scores of overlapping tiles or of several models must make sense (probabilities, not logits).
        class_ids: Global id of each channel; 0 where a channel stands for background.
    """

    scores: Tensor
    class_ids: tuple[int, ...]

    def labels(self) -> Tensor:
        """Global ids ``(N, *S)`` or ``(N,)`` int64 of the winning channel; the first channel wins a tie."""
        ids = torch.as_tensor(self.class_ids, device=self.scores.device)
        return ids[self.scores.argmax(1)]


class Method(Protocol):
    """A way to learn the next task and keep the past.

    Attributes:
        Options: Typed settings that a recipe may give under ``method``.
        sees_all_tasks: True for upper bounds that train on all tasks at once; the stream is then merged.
        kinds: What it can learn: segmentation, classification or both.
    """

    Options: ClassVar[type[BaseModel]]
    sees_all_tasks: ClassVar[bool]
    kinds: ClassVar[frozenset[Kind]]

    def begin(self, task: Task) -> None:
        """Get ready for a task: snapshot the old network, grow the new one. Reads no data."""
        ...

    def phases(self, task: Task) -> Sequence[Phase]:
        """The stages of the work on the task, in order."""
        ...

    def predict(self, images: Tensor) -> Prediction:
        """Scores for images ``(N, C, *S)`` at the input's size, for all classes seen so far."""
        ...

    def kept(self) -> Sequence[Kept]:
        """What besides the network's weights crosses the task boundary."""
        ...

    def state_dict(self) -> Mapping[str, Tensor]:
        """Everything the method remembers (from ``nn.Module``)."""
        ...
