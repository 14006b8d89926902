"""CGR: comprehensive generative replay.

Li, Zhang, Heng, Gu: "Comprehensive Generative Replay for Task-Incremental Segmentation with Concurrent Appearance and
Semantic Forgetting", MICCAI 2024. A diffusion network learns image and mask together and makes pairs of all tasks at
the end of each; generator and segmenter of the next task learn from new data and from these pairs, half and half. One
softmax over background and all classes seen so far; no task is known in prediction.

The published code does not run; its hyper-parameters and formulas stand here, its defects are options (``compat``).
Two additions are off by default, for generators that are small or trained for a short time. Pairs may have the masks
that the segmenter sees in their images (``pairs.labels=seen``; Shin et al., "Continual learning with deep generative
replay", NeurIPS 2017). And the segmenter may agree with itself of before the task (``distill``), with the unbiased
distillation of Cermelli et al., "Modeling the Background for Incremental Learning in Semantic Segmentation", CVPR 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.data.case import Batch
from perdure.data.sampling import Batches, Mix
from perdure.engine.phases import Phase, Terms
from perdure.errors import UsageError
from perdure.kept.items import Kept
from perdure.labels import BACKGROUND, IGNORE
from perdure.methods import training
from perdure.methods.cgr.generator import PairGenerator
from perdure.methods.cgr.options import CgrOptions
from perdure.methods.cgr.prompts import MOST_CLASSES
from perdure.methods.cgr.terms import cross_entropy, rotated, soft_dice, standardised
from perdure.methods.distillation import unbiased_distillation
from perdure.methods.losses import channels_of
from perdure.methods.method import Method
from perdure.methods.options import Setup
from perdure.methods.past import Judge, mixed, need_room
from perdure.methods.prediction import Prediction
from perdure.networks.frozen import Frozen
from perdure.networks.segmenter import Segmenter, upsample
from perdure.streams.task import Task


class Cgr(Method[CgrOptions]):
    """A generator of pairs, and a segmenter that learns from data and pairs.

    The segmenter's first classifier has one more channel, the first: background.
    """

    Options = CgrOptions
    dims: ClassVar[tuple[int, ...]] = (2,)
    most_classes = MOST_CLASSES

    def __init__(self, setup: Setup[CgrOptions]) -> None:
        super().__init__(setup)
        self.network = setup.network(Segmenter)
        if self.network.dims not in self.dims:
            raise UsageError(
                f"a generator of pairs works on images, not in {self.network.dims}D",
                "use volumes.view=slices, or another method: lwf, finetune",
            )
        need_room(self.training_options.batch_size)
        options = self.options
        channels = self.network.in_channels or 3
        self.generator = PairGenerator(options.generator, options.pairs, channels, options.compat)
        self.old_network: Frozen[Segmenter] | None = None
        self.old: tuple[int, ...] = ()
        self.taught: frozenset[int] = frozenset()

    def begin(self, task: Task) -> None:
        """Append a classifier and an adapter. Nothing is frozen but a copy to distil from, if it is asked for."""
        self.class_ids, self.old, self.taught = task.seen, task.old, task.annotated
        self.old_network = Frozen(self.network) if task.index and self.options.distill else None
        background = 1 if task.index == 0 else 0
        if task.new:
            self.network.grow(background + len(task.new))
        self.generator.begin(task)

    def phases(self, task: Task) -> Sequence[Phase]:
        """The generator learns the task ("memory updating"), the segmenter does ("memory evoking"), pairs are made."""

        def data() -> Batches | Mix:
            return mixed(task, self.generator.samples(self, task), self.training_options.batch_size)

        judge = Judge(self._features, self._labels)
        segmenter = training.train_phase(self.network, self.network, task, self.training_options, self.loss, data)
        return [*self.generator.learn(self, task), segmenter, *self.generator.generate(self, task, judge)]

    @property
    def replayed(self) -> int:
        """Generated pairs that the present task trained on."""
        return self.generator.replayed(self)

    def loss(self, batch: Batch) -> Terms:
        """L_Dice + L_CE of real and generated pairs, each sample with the same weight (spec CGR 5.3).

        With ``distill`` also the distance from the segmenter of before the task.
        """
        images, labels = rotated(batch.images, batch.labels, self.options.rotate)
        images = standardised(images)
        logits = upsample(self.network(images)[0].float(), labels.shape[1:])
        channels = channels_of(labels, self.class_ids) + 1  # a class that is not taught is background
        channels = channels.masked_fill(labels == IGNORE, -1)
        terms = {"dice": soft_dice(logits, channels, self.options.dice_absent), "ce": cross_entropy(logits, channels)}
        if self.old_network is not None:
            pair = torch.zeros_like(labels[:, 0, 0]) if batch.parts is None else batch.parts
            distance = self._distance(self.old_network.module, images, logits, channels, pair > 0)
            terms["distill"] = self.options.distill * distance
        return terms

    def _distance(self, old: Segmenter, images: Tensor, logits: Tensor, channels: Tensor, pair: Tensor) -> Tensor:
        """How far logits are from the old segmenter's: everywhere on pairs, elsewhere where nothing is labelled.

        About classes that the task's own labels tell, it is asked on pairs alone. ``pair (N,)`` bool.
        """
        with torch.no_grad():
            wanted = upsample(old(images)[0].float(), channels.shape[1:])
        untold = torch.tensor([c not in self.taught for c in self.old], device=pair.device)
        asked = (channels == 0) | ((channels > 0) & pair.view(-1, 1, 1))
        return unbiased_distillation(logits, wanted, asked, untold | pair[:, None], temperature=1.0)

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        """What the segmenter sees in images, in 4 × 4 parts, ``(N, d)``: copies of real images are looked for there."""
        features = self.network.features(standardised(images.to(self.generator.iteration.device)))
        return F.adaptive_avg_pool2d(features, 4).flatten(1)

    def _labels(self, images: Tensor) -> Tensor:
        return self.predict(images.to(self.generator.iteration.device)).labels()

    @torch.no_grad()
    def predict(self, images: Tensor) -> Prediction:
        """Probabilities of background and all classes seen so far."""
        probabilities = self.network.full_logits(standardised(images)).softmax(1)
        return Prediction.dense(probabilities, (BACKGROUND, *self.class_ids))

    def kept(self) -> Sequence[Kept]:
        """Pairs, counts of masks, and embedded prompts; the generator itself is among the weights."""
        return self.generator.kept("generator.")
