"""Less-forgetting learning: the worked example of docs/adding-a-method.md.

After Jung, Ju, Jung and Kim: "Less-forgetting Learning in Deep Neural Networks", 2016. The classifiers of old classes
are frozen, and the features that they read are held near those of a frozen copy of the network from before the task.
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


class LessForgettingOptions(Options):
    """Settings of the method: what a recipe may write under `method`."""

    hold: float = Field(1.0, ge=0, description="weight of holding the features in place")


class LessForgetting(Method[LessForgettingOptions]):
    """Binary cross-entropy for the new classes, features near those of the old network."""

    Options = LessForgettingOptions
    kinds = frozenset({"segmentation"})
    recurring = "beside_new"  # old classifiers are frozen: a task without new classes has nothing to learn

    def __init__(self, setup: Setup[LessForgettingOptions]) -> None:
        super().__init__(setup)
        self.network = setup.network(Segmenter)
        self.new: tuple[int, ...] = ()
        self.old_network: Frozen[Segmenter] | None = None

    def begin(self, task: Task) -> None:
        """Freeze a copy of the network, append a classifier for the task's classes, freeze the earlier ones."""
        self.new, self.class_ids = task.new, task.seen
        self.old_network = Frozen(self.network) if task.index > 0 else None
        training.grow(self.network, task, self.training_options)
        self.network.freeze_old_classifiers()

    def phases(self, task: Task) -> Sequence[Phase]:
        """One training phase, with the recipe's length, optimiser and schedule."""
        return [training.train_phase(self, self.network, task, self.training_options, self.loss)]

    def loss(self, batch: Batch) -> Terms:
        """Named, weighted terms: the engine minimises their sum and logs each."""
        features = self.network.features(batch.images)
        logits, pos_weight = self.network.classify(features, first=-1), self.training_options.pos_weight
        terms = {"current": class_bce(logits, batch.labels, self.new, pos_weight, annotated=batch.annotated).sum()}
        if self.old_network is not None:
            terms["hold"] = self.options.hold * self.distance(features, batch.images, self.old_network.module)
        return terms

    def distance(self, features: Tensor, images: Tensor, old_network: Segmenter) -> Tensor:
        """Mean squared distance from the old network's features, relative to their mean square."""
        with torch.no_grad():
            wanted = old_network.features(images).float()
        return F.mse_loss(features.float(), wanted) / wanted.square().mean()

    def predict(self, images: Tensor) -> Prediction:
        """Sigmoid scores of all classes seen so far; background where none exceeds 0.5."""
        return training.sigmoid_scores(self.network, images, self.class_ids)
