"""Joint training: all classes with all their labels at once. The upper bound, which keeps every image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor

from perdure.data.case import Batch
from perdure.engine.phases import Phase, Terms
from perdure.methods import training
from perdure.methods.method import Method
from perdure.methods.options import Options, Setup
from perdure.methods.prediction import Prediction
from perdure.networks.network import GrowingNetwork
from perdure.streams.task import Task


class JointOptions(Options):
    """Settings of joint training."""

    unlabelled: Literal["left_out", "background"] = Field(
        "left_out",
        description="what a pixel without label says about classes that its image does not annotate: nothing "
        "(left_out) or, masks taken at their word, that they are absent (background)",
    )
    ignore_as_negative: bool = Field(True, description="count ignored pixels as negatives, as STAR does")


class Joint(Method[JointOptions]):
    """The loss and the network of fine-tuning on the merged stream of all tasks."""

    Options = JointOptions
    kinds = frozenset({"segmentation", "classification"})
    sees_all_tasks = True

    def __init__(self, setup: Setup[JointOptions]) -> None:
        super().__init__(setup)
        self.network = setup.network(GrowingNetwork)

    def begin(self, task: Task) -> None:
        """Append a classifier for the task's classes."""
        training.grow(self.network, task, self.training_options)
        self.class_ids = task.seen

    def phases(self, task: Task) -> Sequence[Phase]:
        """One training phase."""
        return [training.train_phase(self, self.network, task, self.training_options, self.loss)]

    def loss(self, batch: Batch) -> Terms:
        """The loss of all classes."""
        keep = self.options.ignore_as_negative
        if self.options.unlabelled == "background":
            batch = batch._replace(annotated=None)
        return {"current": training.current_loss(self.network, batch, self.class_ids, self.training_options, keep)}

    def predict(self, images: Tensor) -> Prediction:
        """Scores of all classes."""
        return training.scores(self.network, images, self.class_ids)
