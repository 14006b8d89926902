"""Fine-tuning: learn each task and protect nothing. The lower bound that every method has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor

from perdure.data.case import Batch
from perdure.engine.phases import Phase, Terms
from perdure.errors import UsageError
from perdure.kept.items import Kept
from perdure.methods import training
from perdure.methods.method import Method
from perdure.methods.options import Setup
from perdure.methods.prediction import Prediction
from perdure.methods.replay import ReplayOptions, make_past, training_phases
from perdure.networks.network import GrowingNetwork
from perdure.streams.task import Task


class FinetuneOptions(ReplayOptions):
    """Settings of fine-tuning."""

    channels: Literal["seen", "new"] = Field(
        "seen",
        description="which classifiers learn: of all classes seen so far, with old ones as negatives, or the newest",
    )
    unlabelled: Literal["left_out", "background"] = Field(
        "background",
        description="what a pixel without label says about classes that its image does not annotate: nothing "
        "(left_out) or, masks taken at their word, that they are absent (background): earlier structures then collapse",
    )
    ignore_as_negative: bool = Field(True, description="count ignored pixels as negatives, as STAR does")


class Finetune(Method[FinetuneOptions]):
    """The plain loss on the current task's images, nothing else."""

    Options = FinetuneOptions
    kinds = frozenset({"segmentation", "classification"})

    def __init__(self, setup: Setup[FinetuneOptions]) -> None:
        super().__init__(setup)
        self.network = setup.network(GrowingNetwork)
        self.past = make_past(self.options, self.network, self.training_options.batch_size)
        self.averages_images = self.options.replay == "impressions"
        self.most_classes = self.options.most_classes
        self.learning: tuple[int, ...] = ()
        if self.network.kind == "classification" and self.options.replay != "none" and self.options.channels == "new":
            raise UsageError("replayed images have classes that channels=new does not learn", "set channels=seen")
        self.recurring = "learned" if self.options.channels == "seen" else "refused"

    def begin(self, task: Task) -> None:
        """Append a classifier for the task's classes."""
        self.past.begin(task)
        training.grow(self.network, task, self.training_options)
        self.class_ids = task.seen
        self.learning = task.seen
        if self.options.channels == "new":
            # a task without new classes is refused before the run: there would be nothing to learn
            self.learning = task.new
            self.network.freeze_old_classifiers()

    def phases(self, task: Task) -> Sequence[Phase]:
        """One training phase, and those of the replayed past around it."""
        return training_phases(self, self.past, self.network, task, self.loss)

    @property
    def replayed(self) -> int:
        """Samples of earlier tasks that the present task trained on."""
        return self.past.replayed(self)

    def kept(self) -> Sequence[Kept]:
        """What the replayed past keeps."""
        return self.past.kept("past.")

    def loss(self, batch: Batch) -> Terms:
        """The loss of the learning classes on the current task's images."""
        first, keep = -1 if self.options.channels == "new" else 0, self.options.ignore_as_negative
        if self.options.unlabelled == "background":
            batch = batch._replace(annotated=None)
        loss = training.current_loss(self.network, batch, self.learning, self.training_options, keep, first)
        return {"current": loss}

    def predict(self, images: Tensor) -> Prediction:
        """Scores of all classes seen so far."""
        return training.scores(self.network, images, self.class_ids)
