"""Joint training: all classes with all their labels at once. The upper bound, which keeps every image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import BaseModel, Field
from torch import Tensor, nn

from perdure.data.dataset import Batch
from perdure.data.source import Kind
from perdure.engine.phases import Phase, Terms
from perdure.kept.items import Kept
from perdure.methods import training
from perdure.methods.method import Prediction
from perdure.methods.options import Options, Setup
from perdure.networks.network import GrowingNetwork
from perdure.streams.task import Task


class JointOptions(Options):
    """Settings of joint training."""

    ignore_as_negative: bool = Field(True, description="count ignored pixels as negatives, as STAR does")


class Joint(nn.Module):
    """The loss and the network of fine-tuning on the merged stream of all tasks."""

    Options: ClassVar[type[BaseModel]] = JointOptions
    kinds: ClassVar[frozenset[Kind]] = frozenset({"segmentation", "classification"})
    sees_all_tasks: ClassVar[bool] = True

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        assert isinstance(setup.options, JointOptions)
        self.options = setup.options
        self.training_options = setup.training
        self.network = setup.network(GrowingNetwork)
        self.class_ids: tuple[int, ...] = ()

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
        return {"current": training.current_loss(self.network, batch, self.class_ids, self.training_options, keep)}

    def predict(self, images: Tensor) -> Prediction:
        """Scores of all classes."""
        return training.scores(self.network, images, self.class_ids)

    def kept(self) -> Sequence[Kept]:
        """Nothing besides the weights."""
        return []
