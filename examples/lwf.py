"""Learning without Forgetting with one sigmoid per class: the worked example of docs/adding-a-method.md.

After Li and Hoiem: "Learning without Forgetting", ECCV 2016. A frozen copy of the network from before the task
predicts old classes in the new images; the network has to keep predicting the same while it learns the new classes.
Nothing is kept but the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from perdure.data.case import Batch
from perdure.engine.phases import Phase, Terms
from perdure.methods import training
from perdure.methods.losses import class_bce
from perdure.methods.method import Method
from perdure.methods.options import Options, Setup
from perdure.methods.prediction import Prediction
from perdure.networks.frozen import Frozen
from perdure.networks.segmenter import Segmenter
from perdure.streams.task import Task


class LwFOptions(Options):
    """Settings of the method: what a recipe may write under `method`."""

    distill: float = Field(1.0, ge=0, description="weight of agreeing with the old network about old classes")


class LwF(Method[LwFOptions]):
    """Binary cross-entropy for the new classes, agreement with the old network for the old ones."""

    Options = LwFOptions
    kinds = frozenset({"segmentation"})

    def __init__(self, setup: Setup[LwFOptions]) -> None:
        super().__init__(setup)
        self.network = setup.network(Segmenter)
        self.old: tuple[int, ...] = ()
        self.new: tuple[int, ...] = ()
        self.teacher: Frozen[Segmenter] | None = None

    def begin(self, task: Task) -> None:
        """Freeze a copy of the network, then append a classifier for the task's classes."""
        self.old, self.new, self.class_ids = task.old, task.new, task.seen
        self.teacher = Frozen(self.network) if task.index > 0 else None
        training.grow(self.network, task, self.training_options)

    def phases(self, task: Task) -> Sequence[Phase]:
        """One training phase, with the recipe's length, optimiser and schedule."""
        return [training.train_phase(self, self.network, task, self.training_options, self.loss)]

    def loss(self, batch: Batch) -> Terms:
        """Named, weighted terms: the engine minimises their sum and logs each."""
        logits, _ = self.network(batch.images)
        new, pos_weight = logits[:, len(self.old) :], self.training_options.pos_weight
        terms = {"current": class_bce(new, batch.labels, self.new, pos_weight, annotated=batch.annotated).sum()}
        if self.teacher is not None:
            old = logits[:, : len(self.old)]
            terms["distill"] = self.options.distill * self.distillation(old, batch.images, self.teacher.module)
        return terms

    def distillation(self, logits: Tensor, images: Tensor, teacher: Segmenter) -> Tensor:
        """Cross-entropy between old and new probability of each old class, mean over cells, sum over classes."""
        with torch.no_grad():
            wanted = teacher(images)[0].sigmoid()
        by_cell = F.binary_cross_entropy_with_logits(logits.float(), wanted.float(), reduction="none")
        return by_cell.transpose(0, 1).flatten(1).mean(1).sum()

    def predict(self, images: Tensor) -> Prediction:
        """Sigmoid scores of all classes seen so far; background where none exceeds 0.5."""
        return training.sigmoid_scores(self.network, images, self.class_ids)
