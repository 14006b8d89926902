"""A model per task, each trained alone: what the plasticity of a method is measured against.

Nothing is shared and nothing forgotten, at the price of one network per task. Networks of earlier tasks are never
trained or written again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from perdure.data.case import Batch
from perdure.engine.phases import Phase, Terms
from perdure.labels import BACKGROUND
from perdure.methods import training
from perdure.methods.method import Method
from perdure.methods.options import Options, Setup
from perdure.methods.prediction import Prediction
from perdure.networks.network import GrowingNetwork
from perdure.streams.task import Task


class IndependentOptions(Options):
    """Settings of independent models."""

    ignore_as_negative: bool = Field(True, description="count ignored pixels as negatives, as STAR does")


class Independent(Method[IndependentOptions]):
    """One network per task, of all classes that the task annotates, trained as in a first task.

    Predictions are merged: the highest score over all models wins. A class that several tasks annotate gets the highest
    of their models' scores. In classification a model of a single class always says 1.

    Attributes:
        networks: One per task, in task order.
        learned: Class of each channel, per network.
    """

    Options = IndependentOptions
    kinds = frozenset({"segmentation", "classification"})

    def __init__(self, setup: Setup[IndependentOptions]) -> None:
        super().__init__(setup)
        self._setup = setup
        # the first is built now, as other methods do: the first task is then the same as theirs
        self.networks = nn.ModuleList([setup.network(GrowingNetwork)])
        self.learned: tuple[tuple[int, ...], ...] = ()
        self.new: tuple[tuple[int, ...], ...] = ()

    def begin(self, task: Task) -> None:
        """Set the earlier networks aside and build one with fresh weights."""
        if task.index > 0:
            self.networks.requires_grad_(False)
            self.networks.append(self._setup.network(GrowingNetwork))
        self.class_ids = task.seen
        self.new = (*self.new[: task.index], task.new)
        self.learned = (*self.learned[: task.index], tuple(c for c in task.seen if c in task.annotated))
        self._newest.grow(len(self.learned[-1]))

    @property
    def _newest(self) -> GrowingNetwork[Tensor]:
        network = self.networks[-1]
        assert isinstance(network, GrowingNetwork)
        return network

    def phases(self, task: Task) -> Sequence[Phase]:
        """One training phase, of the newest network alone."""
        newest = self._newest
        return [training.train_phase(newest, newest, task, self.training_options, self.loss, fresh=True)]

    def loss(self, batch: Batch) -> Terms:
        """The loss of the task's classes."""
        classes, keep = self.learned[-1], self.options.ignore_as_negative
        return {"current": training.current_loss(self._newest, batch, classes, self.training_options, keep)}

    def predict(self, images: Tensor) -> Prediction:
        """Scores of all classes seen so far, one group per task, so that one network's features exist at a time."""
        background = (BACKGROUND,) if self._newest.kind == "segmentation" else ()
        class_ids = (*background, *self.class_ids)

        def score(channels: Sequence[int]) -> Tensor:
            wanted, best = [class_ids[channel] for channel in channels], None
            for number, (network, known) in enumerate(zip(self.networks, self.learned, strict=True)):
                assert isinstance(network, GrowingNetwork)
                # background scores 0.5 in every model, so that the first one speaks for all
                places = [i for i, c in enumerate(wanted) if c in known or (c == BACKGROUND and number == 0)]
                if not places:
                    continue
                own = training.scores(network, images, known)
                found = own.score([own.class_ids.index(wanted[i]) for i in places])
                if best is None:
                    best = found.new_zeros(len(images), len(wanted), *found.shape[2:])
                best[:, places] = torch.maximum(best[:, places], found)
            assert best is not None  # every class was learned by some model
            return best

        sizes = [len(new) for new in self.new]
        groups = (len(background) + sizes[0], *(size for size in sizes[1:] if size))
        return Prediction(class_ids, score, groups)
