"""Small methods of the kinds that are planned, to show that the contracts bear them. They learn little on purpose.

Named in recipes as ``coming_kinds:Class``; the tests put this folder on Python's path.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from perdure.data.case import Batch
from perdure.data.sampling import Batches
from perdure.engine.phases import Collect, Phase, Terms, Train
from perdure.kept.items import Kept
from perdure.labels import BACKGROUND
from perdure.methods import training
from perdure.methods.losses import class_bce
from perdure.methods.method import Method
from perdure.methods.options import Options, Setup
from perdure.methods.prediction import Prediction
from perdure.networks.frozen import Frozen
from perdure.networks.network import Network
from perdure.streams.task import Task


class Encoder(Network):
    """Features of half the images' size; heads belong to the methods."""

    def __init__(self, dims: int, in_channels: int, width: int) -> None:
        super().__init__(dims, in_channels=in_channels)
        self.width = width
        self.first = nn.Conv2d(in_channels, width, 3, stride=2, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` -> features ``(N, width, H/2, W/2)``."""
        self.check_images(images)
        features: Tensor = self.second(F.relu(self.first(images))).relu()
        return features


def encoder(dims: int, in_channels: int, width: int = 8) -> Encoder:
    """A builder of one's own: ``network: {name: "coming_kinds:encoder", width: 8}``."""
    return Encoder(dims, in_channels, width)


def enlarge(scores: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(scores, like.shape[2:], mode="bilinear", align_corners=False)


class Heads(Method[Options]):
    """A frozen encoder and one head per task (CL-Net's shape): prediction in parts, one per head.

    ``asked`` counts how many channels a single part had at most, for the test.
    """

    largest_part: ClassVar[int] = 0

    def __init__(self, setup: Setup[Options]) -> None:
        super().__init__(setup)
        self.network = setup.network(Encoder).requires_grad_(False)
        self.heads = nn.ModuleList()
        self.sizes: tuple[int, ...] = ()

    def begin(self, task: Task) -> None:
        """A head of its own for the task; earlier ones are frozen."""
        self.heads.requires_grad_(False)
        self.heads.append(nn.Conv2d(self.network.width, len(task.new), 1))
        self.sizes += (len(task.new),)
        self.class_ids = task.seen
        self.new = task.new

    def phases(self, task: Task) -> Sequence[Phase]:
        """A length in steps and an optimiser of the method's own."""
        data = lambda: training.batches(task, self.training_options)  # noqa: E731
        optimizer = lambda: AdamW(self.heads[-1].parameters(), lr=0.02)  # noqa: E731
        return [Train("head", self, self.loss, optimizer, data, steps=3)]

    def loss(self, batch: Batch) -> Terms:
        """Binary cross-entropy of the newest head."""
        logits = self.heads[-1](self.network(batch.images))
        return {"current": class_bce(logits, batch.labels, self.new, annotated=batch.annotated).sum()}

    def predict(self, images: Tensor) -> Prediction:
        """One group per head; background beside the first one."""
        with torch.no_grad():
            features = self.network(images)
        owner = [task for task, size in enumerate(self.sizes) for _ in range(size)]
        place = [channel for size in self.sizes for channel in range(size)]

        def score(channels: Sequence[int]) -> Tensor:
            Heads.largest_part = max(Heads.largest_part, len(channels))
            parts = []
            with torch.no_grad():
                if 0 in channels:
                    parts.append(images.new_full((len(images), 1, *images.shape[2:]), 0.5))
                wanted = [channel - 1 for channel in channels if channel]
                for task in sorted({owner[channel] for channel in wanted}):
                    mine = [place[channel] for channel in wanted if owner[channel] == task]
                    parts.append(enlarge(self.heads[task](features).sigmoid()[:, mine], images))
            return torch.cat(parts, 1)

        groups = (1 + self.sizes[0], *self.sizes[1:])
        return Prediction((BACKGROUND, *self.class_ids), score, groups, features.nbytes)


class TextTable(Method[Options]):
    """Classes are rows of a table made from their names (CLIP-CISS's shape); the decoder has no class count.

    The table is a buffer that crosses task boundaries; phases are counted in steps.
    """

    table: Tensor

    def __init__(self, setup: Setup[Options]) -> None:
        super().__init__(setup)
        self.network = setup.network(Encoder)
        self.project = nn.Linear(16, self.network.width)
        self.register_buffer("table", torch.zeros(0, 16))
        self.old_network: Frozen[Encoder] | None = None

    def begin(self, task: Task) -> None:
        """Append a row for the name of each new class."""
        self.old_network = Frozen(self.network) if task.index else None
        self.class_ids, self.new = task.seen, task.new
        rows = [self._text(task.space.name(class_id)) for class_id in task.new]
        self.table = torch.cat([self.table[: len(task.old)], torch.stack(rows).to(self.table)])

    @staticmethod
    def _text(name: str) -> Tensor:
        return torch.tensor([byte / 128 - 1 for byte in hashlib.blake2b(name.encode(), digest_size=16).digest()])

    def phases(self, task: Task) -> Sequence[Phase]:
        """Two phases with a length in steps; the second only where there is something to distil from."""
        data = lambda: training.batches(task, self.training_options)  # noqa: E731
        first = Train("align", self, self.loss, self._optimizer, data, steps=2)
        second = Train("distil", self, self.distil, self._optimizer, data, steps=2)
        return [first, second] if self.old_network else [first]

    def _optimizer(self) -> AdamW:
        groups = self.network.parameter_groups()
        return AdamW([{"params": groups["network"], "lr": 0.01}, {"params": self.project.parameters(), "lr": 0.05}])

    def _logits(self, features: Tensor, rows: Tensor) -> Tensor:
        return torch.einsum("ndhw,kd->nkhw", features, self.project(rows))

    def loss(self, batch: Batch) -> Terms:
        """Binary cross-entropy of the new classes' queries."""
        logits = self._logits(self.network(batch.images), self.table[-len(self.new) :])
        return {"current": class_bce(logits, batch.labels, self.new).sum()}

    def distil(self, batch: Batch) -> Terms:
        """As before, and features stay where they were."""
        assert self.old_network is not None
        with torch.no_grad():
            before = self.old_network.module(batch.images)
        return self.loss(batch) | {"features": (self.network(batch.images) - before).square().mean()}

    @torch.no_grad()
    def predict(self, images: Tensor) -> Prediction:
        """Sigmoid scores beside background."""
        scores = enlarge(self._logits(self.network(images), self.table).sigmoid(), images)
        background = scores.new_full((len(images), 1, *scores.shape[2:]), 0.5)
        return Prediction.dense(torch.cat([background, scores], 1), (BACKGROUND, *self.class_ids))

    def kept(self) -> Sequence[Kept]:
        """The table."""
        return [Kept("text-table", "statistics", ("table",), "names of the classes", per_class=True)]


class Gate(Method[Options]):
    """Prunes, measures, and decides by what it measured whether it has to recover (CL-Net's gate).

    The decision follows from the buffer ``error``, which no later phase changes, so that a resumed run decides alike.
    """

    error: Tensor

    def __init__(self, setup: Setup[Options]) -> None:
        super().__init__(setup)
        self.network = setup.network(Encoder)
        self.head = nn.ModuleList()
        self.register_buffer("error", torch.zeros(()))

    def begin(self, task: Task) -> None:
        """A head of its own for the task."""
        self.head.append(nn.Conv2d(self.network.width, len(task.new), 1))
        self.class_ids, self.new, self.index = task.seen, task.new, task.index
        self.error = torch.zeros(())

    def phases(self, task: Task) -> Iterator[Phase]:
        """Learn, prune and measure; recover after the second task only, where the gate is set to close."""

        def data() -> Batches:
            return training.batches(task, self.training_options)

        optimizer = lambda: AdamW(self.parameters(), lr=0.02)  # noqa: E731
        yield Train("learn", self, self.loss, optimizer, data, steps=2, finish=self._prune)
        yield Collect("measure", self, data, self._measure, self._keep)
        if self.error > (1e9 if self.index == 0 else 0.0):
            yield Train("recover", self, self.loss, optimizer, data, steps=2)

    @torch.no_grad()
    def _prune(self) -> None:
        self.network.second.weight[::2] = 0

    def loss(self, batch: Batch) -> Terms:
        """Binary cross-entropy of the newest head."""
        logits = self.head[-1](self.network(batch.images))
        return {"current": class_bce(logits, batch.labels, self.new).sum()}

    def _measure(self, batch: Batch) -> dict[str, Tensor]:
        return {"error": self.loss(batch)["current"].double()}

    def _keep(self, sums: dict[str, Tensor]) -> None:
        self.error = sums["error"].float()

    def kept(self) -> Sequence[Kept]:
        """The number that the gate decided by."""
        return [Kept("gate", "statistics", ("error",), "loss on the task's training images after pruning")]

    @torch.no_grad()
    def predict(self, images: Tensor) -> Prediction:
        """Sigmoid scores beside background."""
        features = self.network(images)
        scores = enlarge(torch.cat([head(features) for head in self.head], 1).sigmoid(), images)
        background = scores.new_full((len(images), 1, *scores.shape[2:]), 0.5)
        return Prediction.dense(torch.cat([background, scores], 1), (BACKGROUND, *self.class_ids))
