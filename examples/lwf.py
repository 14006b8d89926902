"""Learning without Forgetting with one sigmoid a class: the worked example of docs/adding-a-method.md.

After Li and Hoiem: "Learning without Forgetting", ECCV 2016. A frozen copy of the network from before the task says
what it sees in the new images; the network has to go on saying the same while it learns the new classes. Nothing is
kept but the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field
from torch import Tensor, nn

from perdure.data.case import Batch
from perdure.data.source import Kind
from perdure.engine.phases import Phase, Terms
from perdure.kept.items import Kept
from perdure.methods import training
from perdure.methods.losses import class_bce
from perdure.methods.method import Prediction
from perdure.methods.options import Options, Setup
from perdure.networks.segmenter import Segmenter
from perdure.streams.task import Task


class LwFOptions(Options):
    """Settings of the method: what a recipe may write under `method`."""

    distill: float = Field(1.0, ge=0, description="weight of agreeing with the old network about old classes")


class LwF(nn.Module):
    """Binary cross-entropy for the new classes, agreement with the old network for the old ones."""

    Options: ClassVar[type[BaseModel]] = LwFOptions
    kinds: ClassVar[frozenset[Kind]] = frozenset({"segmentation"})
    sees_all_tasks: ClassVar[bool] = False

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        assert isinstance(setup.options, LwFOptions)
        self.options = setup.options
        self.training_options = setup.training
        self.network = setup.network(Segmenter)
        self.old: tuple[int, ...] = ()
        self.new: tuple[int, ...] = ()
        # In a tuple, so that the frozen copy is no submodule: it is neither trained nor saved.
        self.teacher: tuple[Segmenter, ...] = ()

    def begin(self, task: Task) -> None:
        """Freeze a copy of the network, then append a classifier for the task's classes."""
        self.old, self.new = task.old, task.new
        if task.index > 0:
            self.teacher = (copy.deepcopy(self.network).eval().requires_grad_(False),)
        training.grow(self.network, task, self.training_options)

    def phases(self, task: Task) -> Sequence[Phase]:
        """One training phase, with the recipe's length, optimiser and schedule."""
        return [training.train_phase(self, self.network, task, self.training_options, self.loss)]

    def loss(self, batch: Batch) -> Terms:
        """Named, weighted terms: the engine minimises their sum and logs each."""
        logits, _ = self.network(batch.images)
        pos_weight = self.training_options.pos_weight
        terms = {"current": class_bce(logits[:, len(self.old) :], batch.labels, self.new, pos_weight).sum()}
        if self.old:
            terms["distill"] = self.options.distill * self.distillation(logits[:, : len(self.old)], batch.images)
        return terms

    def distillation(self, logits: Tensor, images: Tensor) -> Tensor:
        """Cross-entropy between old and new probability of each old class, mean over cells, sum over classes."""
        with torch.no_grad():
            wanted = self.teacher[0].to(images.device)(images)[0].sigmoid()
        by_cell = F.binary_cross_entropy_with_logits(logits.float(), wanted.float(), reduction="none")
        return by_cell.transpose(0, 1).flatten(1).mean(1).sum()

    def predict(self, images: Tensor) -> Prediction:
        """Sigmoid scores of all classes seen so far; background where none exceeds 0.5."""
        return training.sigmoid_scores(self.network, images, self.old + self.new)

    def kept(self) -> Sequence[Kept]:
        """Nothing besides the weights, which the ledger lists by itself."""
        return []
