"""Class impressions for segmentation. Ours: CCSI (MedIA 2024) classifies images, this carries its idea to masks.

There is no published counterpart and no figure to compare with; the design follows section 8 of the specification
of CCSI. Of every class the mean patch, the mean mask and statistics of place, size, colour and co-occurrence are kept,
and moments of the network's feature maps. At later tasks layouts are drawn from these, the old network turns a
coarse start image into one in which it predicts the layout, labels it, and the new network replays old classes on it,
together with the new images, on which confident predictions of the old network stand in for missing labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from perdure.data.case import Batch
from perdure.data.sampling import Batches, Mix
from perdure.data.tensors import tensor_view
from perdure.engine.phases import Phase, Terms
from perdure.kept.items import Kept
from perdure.labels import BACKGROUND, IGNORE
from perdure.methods import training
from perdure.methods.ccsi.terms import less_forget
from perdure.methods.ccsi_seg.impressions import SynthesisOptions
from perdure.methods.ccsi_seg.memory import ImpressionMemory
from perdure.methods.ccsi_seg.statistics import decode
from perdure.methods.ccsi_seg.terms import pixel_margin, pseudo_labels
from perdure.methods.losses import class_bce
from perdure.methods.method import Method
from perdure.methods.options import Options, Setup
from perdure.methods.prediction import Prediction
from perdure.networks.segmenter import Segmenter, upsample
from perdure.streams.task import Task


class CcsiSegOptions(Options):
    """Settings of the method."""

    replay: Literal["impressions", "means", "none"] = Field(
        "impressions",
        description="what is replayed for old classes: synthesised images, start images as they are, or nothing",
    )
    synthesis: SynthesisOptions = Field(SynthesisOptions(), description="how impressions are made")
    patch: int = Field(32, ge=4, description="side of the mean patches in pixels")
    share: float = Field(1.0, gt=0, description="synthetic images per real one in a batch")
    confidence: float = Field(0.7, ge=0.5, lt=1, description="least certainty of a pseudo-label on a real image")
    lambda_pseudo: float = Field(1.0, ge=0, description="weight of pseudo-labels of old classes on real images")
    lambda_old: float = Field(1.0, ge=0, description="weight of old classes on synthetic images")
    lambda_new: float = Field(1.0, ge=0, description="weight of new classes on synthetic images")
    negatives: Literal["old_pixels", "all"] = Field(
        "old_pixels",
        description="where new classes are absent in synthetic images: where an old class is predicted, or anywhere",
    )
    lambda_lf: float = Field(5.0, ge=0, description="weight of distilling features (less-forget), times √(old / new)")
    lambda_margin: float = Field(0.0, ge=0, description="weight of the margin between old and new classes; 0 for none")
    margin: float = Field(1.0, description="least lead of the own logit over new ones on old pixels")
    ignore_as_negative: bool = Field(True, description="count ignored pixels as negatives of new classes")
    previews: int = Field(4, ge=0, description="impressions per class shown in the report")


class CcsiSeg(Method[CcsiSegOptions]):
    """Replay of synthesised images under drawn layouts, pseudo-labels and distillation of features."""

    Options = CcsiSegOptions
    dims: ClassVar[tuple[int, ...]] = (2,)
    averages_images = True
    recurring = "refused"

    def __init__(self, setup: Setup[CcsiSegOptions]) -> None:
        super().__init__(setup)
        self.network = setup.network(Segmenter)
        options = self.options
        optimise = options.replay != "means"
        self.memory = ImpressionMemory(self.network, options.synthesis, options.patch, options.previews, optimise)
        self.old: tuple[int, ...] = ()
        self.new: tuple[int, ...] = ()

    def begin(self, task: Task) -> None:
        """Freeze a copy of the network and append the new classifier."""
        self.class_ids, self.old, self.new = task.seen, task.old, task.new
        self.memory.begin(task, self.network)
        training.grow(self.network, task, self.training_options)

    def phases(self, task: Task) -> Sequence[Phase]:
        """Synthesise (later tasks), train, measure."""
        memory = self.memory

        def data() -> Batches:
            return training.batches(task, self.training_options)

        def mixed() -> Batches | Mix:
            if memory.images is None or memory.labels is None:
                return data()
            made = tensor_view(memory.images, memory.labels, task.space)  # stays coded in bytes; the loss decodes
            size = max(1, round(self.options.share * self.training_options.batch_size))
            return Mix((data(), Batches(made, size)))

        loss = self.later_loss if self.old else self.first_loss
        return [
            *([memory.generate()] if self.old and self.options.replay != "none" else []),
            training.train_phase(self, self.network, task, self.training_options, loss, mixed),
            memory.collect(task, self.network, self.options.confidence, data),
        ]

    @property
    def replayed(self) -> int:
        """Impressions of old classes that showed their layout."""
        return self.memory.replayed

    # The losses -----------------------------------------------------------------------------------------------

    def first_loss(self, batch: Batch) -> Terms:
        """Binary cross-entropy on the images."""
        keep = self.options.ignore_as_negative
        return {"current": training.current_loss(self.network, batch, self.new, self.training_options, keep)}

    def later_loss(self, batch: Batch) -> Terms:
        """8.5: labels, pseudo-labels and distillation on new images; labels and distillation on synthetic ones."""
        options, weight = self.options, self.training_options.pos_weight
        new_part, made = batch.of(0), batch.of(1)
        images, labels, real = new_part.images, new_part.labels, len(new_part.images)
        if len(made.images):
            images = torch.cat([images, decode(made.images, self.memory.statistics.ends).to(images)])
        with torch.no_grad():
            before = self.memory.teacher.features(images)
            old_logits = upsample(self.memory.teacher.classify(before[:real]).float(), images.shape[2:])
        features = self.network.features(images)
        logits = self.network.classify(features)
        old, new = logits[:, : len(self.old)], logits[:, len(self.old) :]

        # new images: what is labelled as new is no old class; elsewhere confident predictions of the old network count
        pseudo = pseudo_labels(old_logits, self.old, options.confidence)
        pseudo = torch.where(labels == BACKGROUND, pseudo, labels)
        current = class_bce(new[:real], labels, self.new, weight, options.ignore_as_negative, new_part.annotated)
        away = (len(self.old) / len(self.new)) ** 0.5 * options.lambda_lf
        terms = {
            "current": current.sum(),
            "pseudo": options.lambda_pseudo * class_bce(old[:real], pseudo, self.old, weight, False).sum(),
            "lf": away * less_forget(features, before),
        }
        if len(made.images):
            terms |= self._replay_terms(old[real:], new[real:], made.labels)
        return terms

    def _replay_terms(self, old: Tensor, new: Tensor, labels: Tensor) -> Terms:
        """Old classes on synthetic images as labelled; new ones are absent, at least where an old class is."""
        options, weight = self.options, self.training_options.pos_weight
        absent = torch.where(labels == BACKGROUND, IGNORE, labels) if options.negatives == "old_pixels" else labels
        terms = {
            "old": options.lambda_old * class_bce(old, labels, self.old, weight, False).sum(),
            "new": options.lambda_new * class_bce(new, absent, self.new, weight, False).sum(),
        }
        if options.lambda_margin:
            logits = upsample(torch.cat([old, new], 1).float(), labels.shape[1:])
            terms["margin"] = options.lambda_margin * pixel_margin(logits, labels, self.old, options.margin)
        return terms

    # The rest -------------------------------------------------------------------------------------------------

    def predict(self, images: Tensor) -> Prediction:
        """Sigmoid scores of all classes seen so far; background where none exceeds 0.5."""
        return training.sigmoid_scores(self.network, images, self.class_ids)

    def kept(self) -> Sequence[Kept]:
        """Mean patches and masks, statistics, and a few impressions to look at."""
        return self.memory.kept("memory.")
