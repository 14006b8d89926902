"""Class impressions for segmentation. Ours: CCSI (MedIA 2024) classifies images, this carries its idea to masks.

There is no published counterpart and no figure to compare with; the design follows section 8 of the specification
of CCSI. Of every class the mean patch, the mean mask and statistics of place, size, colour and co-occurrence are kept,
and moments of the network's feature maps. At later tasks layouts are drawn from these, the old network turns a
coarse start image into one in which it predicts the layout, labels it, and the new network replays old classes on it,
together with the new images, on which confident predictions of the old network stand in for missing labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from perdure.data.case import Batch
from perdure.data.sampling import Batches, Mix
from perdure.data.tensors import tensor_view
from perdure.engine.phases import Collect, Generate, Phase, Progress, Terms
from perdure.errors import PerdureError, UsageError
from perdure.files import read_tensors
from perdure.kept.items import Kept
from perdure.labels import BACKGROUND, IGNORE
from perdure.methods import training
from perdure.methods.ccsi.terms import less_forget
from perdure.methods.ccsi_seg.impressions import Request, SynthesisOptions, plan_impressions, synthesise
from perdure.methods.ccsi_seg.measurements import (
    background_sums,
    label_sums,
    layer_of,
    recorded_maps,
    region_sums,
)
from perdure.methods.ccsi_seg.statistics import BUFFERS, SHOWN, Statistics, decode, encode
from perdure.methods.ccsi_seg.terms import agreement, edge_band, pixel_margin, pseudo_labels
from perdure.methods.losses import channels_of, class_bce
from perdure.methods.method import Method
from perdure.methods.options import Options, Setup
from perdure.methods.prediction import Prediction
from perdure.networks.frozen import Frozen
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
    """Replay of synthesised images under drawn layouts, pseudo-labels and distillation of features.

    ``statistics`` crosses task boundaries; ``previews (K_old, n, C, H, W)`` uint8 are shown in the report; ``yields
    (2,)`` int64 says how many impressions were made for the latest task and how many showed their layout.
    ``images (M, C, H, W)`` uint8 and ``labels (M, H, W)`` int16 exist only while a later task is under way.
    """

    Options = CcsiSegOptions
    dims: ClassVar[tuple[int, ...]] = (2,)
    averages_images = True
    recurring = "refused"
    previews: Tensor | None
    yields: Tensor
    images: Tensor | None
    labels: Tensor | None

    def __init__(self, setup: Setup[CcsiSegOptions]) -> None:
        super().__init__(setup)
        self.network = setup.network(Segmenter)
        if self.network.dims not in self.dims:
            raise UsageError(
                f"class impressions for segmentation work on images, not in {self.network.dims}D",
                "use 2D data, or another method: finetune, star",
            )
        self.statistics = Statistics()
        self.old: tuple[int, ...] = ()
        self.new: tuple[int, ...] = ()
        self.old_network: Frozen[Segmenter] | None = None
        self.register_buffer("yields", torch.zeros(2, dtype=torch.int64))
        for name in ("previews", "images", "labels"):
            self.register_buffer(name, None)

    def begin(self, task: Task) -> None:
        """Freeze a copy of the network and append the new classifier."""
        self.class_ids, self.old, self.new = task.seen, task.old, task.new
        self.images = self.labels = None
        self.old_network = Frozen(self.network) if task.index > 0 else None
        training.grow(self.network, task, self.training_options)

    def phases(self, task: Task) -> Sequence[Phase]:
        """Synthesise (later tasks), train, measure."""
        phases: list[Phase] = []
        later, options = task.index > 0, self.options.synthesis

        def data() -> Batches:
            return training.batches(task, self.training_options)

        def mixed() -> Batches | Mix:
            if self.images is None or self.labels is None:
                return data()
            made = tensor_view(self.images, self.labels, task.space)  # stays coded in bytes; the loss decodes
            size = max(1, round(self.options.share * self.training_options.batch_size))
            return Mix((data(), Batches(made, size)))

        if later and self.options.replay != "none":
            count = -(-options.per_class * len(self.old) // options.batch)
            phases.append(Generate("impressions", self, count, self.make, self.finish))
        loss = self.later_loss if later else self.first_loss
        phases.append(training.train_phase(self, self.network, task, self.training_options, loss, mixed))
        phases.append(Collect("statistics", self, data, self.measure, self.finish_measuring))
        return phases

    @property
    def replayed(self) -> int:
        """Impressions of old classes that showed their layout."""
        return int(self.yields[1]) if self.old else 0

    @property
    def _teacher(self) -> Segmenter:
        assert self.old_network is not None
        return self.old_network.module

    # Impressions ----------------------------------------------------------------------------------------------

    def make(self, index: int, progress: Progress | None = None) -> Mapping[str, Tensor]:
        """Item ``index``: images and labels that passed, coded, and how many were tried."""
        options, teacher, ends = self.options.synthesis, self._teacher, self.statistics.ends
        if progress is not None and progress.saved is not None:
            request = Request(*(progress.saved["request"][name].to(self.yields.device) for name in Request._fields))
        else:
            request = plan_impressions(self.statistics, options, len(self.old), index)
        if self.options.replay == "means":
            images, passed = encode(request.start, ends), torch.ones(len(request.start), dtype=torch.bool)
            named = torch.tensor((*self.old, BACKGROUND), device=images.device)  # row -1 of a layout is the last
            labels = torch.where(edge_band(request.layouts, options.band), IGNORE, named[request.layouts])
        else:
            images = encode(synthesise(teacher, request, self.statistics, options, progress), ends)
            with torch.no_grad():  # on the images as they are stored, because the new network trains on these
                features = teacher.features(decode(images, ends))
                logits = upsample(teacher.classify(features).float(), images.shape[2:])
            rows = channels_of(pseudo_labels(logits, self.old, 0.5), self.old)
            passed = agreement(rows, request.layouts, len(self.old)) >= options.least_dice
            labels = pseudo_labels(logits, self.old, options.confidence)
        passed = passed.to(images.device)
        return {
            "images": images[passed].cpu(),
            "labels": labels.to(torch.int16)[passed].cpu(),
            "tried": torch.tensor(len(images)),
        }

    def finish(self, paths: Iterable[Path]) -> None:
        """Put the items together.

        Raises:
            PerdureError: None of the impressions shows its layout.
        """
        items = [read_tensors(path) for path in paths]
        images, labels = (torch.cat([item[name] for item in items]) for name in ("images", "labels"))
        tried = int(sum(int(item["tried"]) for item in items))
        if not len(images):
            raise PerdureError(
                f"in none of {tried} impressions the old network predicts the layout that was asked for",
                "raise method.synthesis.steps, lower method.synthesis.least_dice, or set method.replay=none",
            )
        self.yields = torch.tensor([tried, len(images)], device=self.yields.device)
        self.images, self.labels = images.to(self.yields.device), labels.to(self.yields.device)
        count = self.options.previews
        if count:  # the first images that show each class; black where there are too few
            self.previews = self.images.new_zeros(len(self.old), count, *images.shape[1:])
            for row, class_id in enumerate(self.old):
                shown = self.images[(self.labels == class_id).flatten(1).any(1)][:count]
                self.previews[row, : len(shown)] = shown

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
            images = torch.cat([images, decode(made.images, self.statistics.ends).to(images)])
        with torch.no_grad():
            before = self._teacher.features(images)
            old_logits = upsample(self._teacher.classify(before[:real]).float(), images.shape[2:])
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

    # What is stored -------------------------------------------------------------------------------------------

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """Sums over a batch: regions of new classes, background, co-occurrence, and moments of feature maps.

        Old classes are where nothing is labelled and the network predicts them with confidence.
        """
        images, classes = batch.images, len(self.class_ids)
        with recorded_maps(self.network.body) as maps:
            features = self.network.features(images)
        rows = channels_of(batch.labels, self.class_ids)
        if self.old:
            logits = upsample(self.network.classify(features)[:, : len(self.old)].float(), images.shape[2:])
            guess = channels_of(pseudo_labels(logits, self.old, self.options.confidence), self.class_ids)
            rows = torch.where(batch.labels == BACKGROUND, guess, rows)
        known = batch.labels != IGNORE
        shown = images.new_zeros(len(images), 1 + classes).scatter_(1, rows.flatten(1) + 1, 1.0)[:, 1:]
        new = channels_of(batch.labels, self.new)
        sums = region_sums(images, new, len(self.new), self.options.patch)
        sums |= background_sums(images, (rows < 0) & known, self.options.patch)
        sums |= label_sums(maps, rows, known, classes)._asdict()
        sums["co_occurrence"] = (shown.T @ shown).round().long()
        sums["size"] = torch.tensor(images.shape[2:], device=images.device) * len(images)
        sums["channels"] = torch.bincount(layer_of(maps))
        sums["batches"] = torch.ones((), dtype=torch.int64, device=images.device)
        return sums

    def finish_measuring(self, totals: dict[str, Tensor]) -> None:
        """Turn the sums into statistics; synthetic images are no longer needed."""
        layers = torch.repeat_interleave(totals["channels"] // totals["batches"])
        self.statistics.update(totals, len(self.old), layers)
        self.images = self.labels = None

    # The rest -------------------------------------------------------------------------------------------------

    def predict(self, images: Tensor) -> Prediction:
        """Sigmoid scores of all classes seen so far; background where none exceeds 0.5."""
        return training.sigmoid_scores(self.network, images, self.class_ids)

    def kept(self) -> Sequence[Kept]:
        """Mean patches and masks, statistics, and a few impressions to look at."""
        source = "from the training images of the task that taught the class"
        tried, used = self.yields.tolist()
        shown = self.statistics.co_occurrence.diagonal()[len(self.old) :]  # of crops: perhaps fewer than in the list
        fewest = int(shown.min()) if len(shown) else None
        few = ", which is few: the network hardly recognises its old classes any more" if 2 * used < tried else ""
        items = [
            Kept(
                "class-means",
                "statistics",
                tuple(f"statistics.{name}" for name in SHOWN),
                f"of each class the mean patch around its regions and their mean mask, {source}",
                per_class=True,
                shows="images",
                from_images=fewest,
            ),
            Kept(
                "statistics",
                "statistics",
                (*(f"statistics.{name}" for name in BUFFERS), "yields"),
                "place, size, colour and co-occurrence of each class's regions, colour and texture of the background, "
                f"mean and variance of the network's feature maps, {source}; of {tried} impressions made for this "
                f"task {used} showed their layout and were used{few}",
                per_class=True,
                from_images=fewest,
            ),
        ]
        if self.previews is not None:
            text = "impressions of old classes optimised against the network before this task; shown in the report"
            items.append(Kept("previews", "synthetic", ("previews",), text, shows="images"))
        return items
