"""Class impressions for segmentation. Ours: CCSI (MedIA 2024) recognises images, this is its idea carried to masks.

There is no published counterpart and no figure to compare with; the design follows section 8 of the specification
of CCSI. Of every class the mean patch, the mean mask and some numbers on place, size, colour and company are kept,
and moments of the network's feature maps. At later tasks layouts are drawn from these, the old network turns a
coarse start image into one in which it sees the layout, labels it, and the new network rehearses old classes on it,
beside the new images on which the old network's sure predictions stand for the labels that are missing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Self

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from perdure.data.dataset import Batch
from perdure.data.source import Kind
from perdure.engine.phases import Batches, Collect, Generate, Phase, Progress, Terms
from perdure.errors import PerdureError, UsageError
from perdure.files import read_tensors
from perdure.kept.items import Kept
from perdure.labels import BACKGROUND, IGNORE
from perdure.methods import training
from perdure.methods.ccsi_seg import making, synthesis
from perdure.methods.ccsi_seg.ground import decode, encode, ground_sums
from perdure.methods.ccsi_seg.moments import label_sums, layer_of, tapped
from perdure.methods.ccsi_seg.options import LayoutImpressionsOptions
from perdure.methods.ccsi_seg.regions import region_sums
from perdure.methods.ccsi_seg.state import BUFFERS, SHOWN, Statistics
from perdure.methods.ccsi_seg.terms import agreement, believed, less_forget, pixel_margin
from perdure.methods.losses import channels_of, class_bce
from perdure.methods.method import Prediction
from perdure.methods.options import Setup
from perdure.networks.segmenter import Segmenter, upsample
from perdure.streams.task import Task


class CcsiSeg(nn.Module):
    """Replay of synthesised images under drawn layouts, pseudo-labels and distillation of features.

    ``statistics`` crosses task boundaries; ``previews (K_old, n, C, H, W)`` uint8 are shown in the report; ``yields
    (2,)`` int64 says how many impressions were made for the latest task and how many showed their layout.
    ``images (M, C, H, W)`` and ``labels (M, H, W)``, both uint8, exist only while a later task is under way.
    """

    Options: ClassVar[type[BaseModel]] = LayoutImpressionsOptions
    kinds: ClassVar[frozenset[Kind]] = frozenset({"segmentation"})
    dims: ClassVar[tuple[int, ...]] = (2,)
    sees_all_tasks: ClassVar[bool] = False
    previews: Tensor | None
    yields: Tensor
    images: Tensor | None
    labels: Tensor | None

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        assert isinstance(setup.options, LayoutImpressionsOptions)
        self.options = setup.options
        self.training_options = setup.training
        network = setup.network(Segmenter)
        if network.dims not in self.dims:
            raise UsageError(
                f"class impressions for segmentation work on images, not in {network.dims}D",
                "use 2D data, or another method: finetune, star",
            )
        self.network = network
        self.statistics = Statistics()
        self.class_ids: tuple[int, ...] = ()
        self.old: tuple[int, ...] = ()
        self.new: tuple[int, ...] = ()
        # In a tuple, so that the frozen copy is no submodule: it is neither trained nor saved.
        self._old_network: tuple[Segmenter, ...] = ()
        self.register_buffer("yields", torch.zeros(2, dtype=torch.int64))
        for name in ("previews", "images", "labels"):
            self.register_buffer(name, None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the frozen copy along with the module."""
        for network in self._old_network:
            network._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def begin(self, task: Task) -> None:
        """Freeze a copy of the network and append the new classifier."""
        self.class_ids, self.old, self.new = task.seen, task.old, task.new
        self.images = self.labels = None
        self._old_network = ()
        if task.index > 0:
            self._old_network = (copy.deepcopy(self.network).eval().requires_grad_(False),)
        training.grow(self.network, task, self.training_options)

    def phases(self, task: Task) -> Sequence[Phase]:
        """Synthesise (later tasks), train, measure."""
        phases: list[Phase] = []
        later, options = task.index > 0, self.options.synthesis
        if later and self.options.replay != "none":
            count = -(-options.per_class * len(self.old) // options.batch)
            phases.append(Generate("impressions", self, count, self.make, self.take))
        loss = self.later_loss if later else self.first_loss
        phases.append(training.train_phase(self, self.network, task, self.training_options, loss))

        def data() -> Batches:
            return training.batches(task, self.training_options)

        phases.append(Collect("statistics", self, data, self.measure, self.keep))
        return phases

    # Synthesis ------------------------------------------------------------------------------------------------

    def make(self, index: int, progress: Progress | None = None) -> Mapping[str, Tensor]:
        """Item ``index``: images and labels that passed, uint8, and how many were tried."""
        options, (teacher,) = self.options.synthesis, self._old_network
        saved = progress.saved if progress is not None else None
        job = synthesis.resumed(saved, self._device) if saved is not None else self._plan(index)
        if self.options.replay == "means":
            labels = making.layout_labels(job.layouts, self._ids(self.old), options.band)
            return self._packed(job.start, labels, torch.ones(len(labels), dtype=torch.bool))
        found = synthesis.optimise(teacher, job, self.statistics.bank(), self.statistics.ends, options, progress)
        # what the network will be shown later: the images as they are stored
        found = decode(encode(found, self.statistics.ends), self.statistics.ends)
        with torch.no_grad():
            logits = upsample(teacher.classify(teacher.features(found)).float(), found.shape[2:])
        seen = channels_of(believed(logits, self._ids(self.old), 0.5), self.old)
        passed = agreement(seen, job.layouts, len(self.old)) >= options.least_dice
        return self._packed(found, believed(logits, self._ids(self.old), options.confidence), passed)

    def _plan(self, index: int) -> synthesis.Request:
        return making.plan_item(self.statistics, self.options.synthesis, len(self.old), index)

    def _packed(self, images: Tensor, labels: Tensor, passed: Tensor) -> dict[str, Tensor]:
        passed = passed.to(images.device)
        return {
            "images": encode(images, self.statistics.ends)[passed].cpu(),
            "labels": labels.to(torch.int16)[passed].cpu(),
            "tried": torch.tensor(len(images)),
        }

    def take(self, paths: Iterable[Path]) -> None:
        """Put the items together.

        Raises:
            PerdureError: None of the impressions shows its layout.
        """
        items = [read_tensors(path) for path in paths]
        images, labels = (torch.cat([item[name] for item in items]) for name in ("images", "labels"))
        tried = int(sum(int(item["tried"]) for item in items))
        if not len(images):
            raise PerdureError(
                f"in none of {tried} impressions the old network sees the layout that was asked for",
                "raise method.synthesis.steps, lower method.synthesis.least_dice, or set method.replay=none",
            )
        self.yields = torch.tensor([tried, len(images)], device=self._device)
        self.images, self.labels = images.to(self._device), labels.to(self._device)
        shown = self.options.previews
        self.previews = making.first_of_each(self.images, self.labels, self.old, shown) if shown else None

    # The losses -----------------------------------------------------------------------------------------------

    def first_loss(self, batch: Batch) -> Terms:
        """Binary cross-entropy on the images."""
        keep = self.options.ignore_as_negative
        return {"current": training.current_loss(self.network, batch, self.new, self.training_options, keep)}

    def later_loss(self, batch: Batch) -> Terms:
        """8.5: labels, pseudo-labels and distillation on new images; labels and distillation on synthetic ones."""
        options, weight = self.options, self.training_options.pos_weight
        real = len(batch.images)
        made, made_labels = self._draw(max(1, round(options.share * real)))
        images = batch.images if made is None else torch.cat([batch.images, made.to(batch.images)])
        (teacher,) = self._old_network
        with torch.no_grad():
            before = teacher.features(images)
            old_logits = upsample(teacher.classify(before[:real]).float(), images.shape[2:])
        features = self.network.features(images)
        logits = self.network.classify(features)
        old, new = logits[:, : len(self.old)], logits[:, len(self.old) :]

        # new images: what is labelled as new is no old class; elsewhere the old network's word counts where it is sure
        pseudo = believed(old_logits, self._ids(self.old), options.confidence)
        pseudo = torch.where(batch.labels == BACKGROUND, pseudo, batch.labels)
        away = (len(self.old) / len(self.new)) ** 0.5 * options.lambda_lf
        terms = {
            "current": class_bce(new[:real], batch.labels, self.new, weight, options.ignore_as_negative).sum(),
            "pseudo": options.lambda_pseudo * class_bce(old[:real], pseudo, self.old, weight, False).sum(),
            "lf": away * less_forget(features, before),
        }
        if made_labels is not None:
            terms |= self._replay_terms(old[real:], new[real:], made_labels)
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
            terms["margin"] = options.lambda_margin * pixel_margin(logits, labels, self._ids(self.old), options.margin)
        return terms

    def _draw(self, count: int) -> tuple[Tensor | None, Tensor | None]:
        """A random batch of synthetic images and labels; uses torch's generator."""
        if self.images is None or self.labels is None:
            return None, None
        picked = torch.randint(len(self.images), (count,)).to(self._device)
        return decode(self.images[picked], self.statistics.ends), self.labels[picked].long()

    # What is stored -------------------------------------------------------------------------------------------

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """Sums over a batch: regions of new classes, ground, company, and moments of the network's feature maps.

        Old classes are where nothing is labelled and the network sees them for sure.
        """
        images, classes = batch.images, len(self.class_ids)
        with tapped(self.network.body) as maps:
            features = self.network.features(images)
        rows = channels_of(batch.labels, self.class_ids)
        if self.old:
            logits = upsample(self.network.classify(features)[:, : len(self.old)].float(), images.shape[2:])
            guess = channels_of(believed(logits, self._ids(self.old), self.options.confidence), self.class_ids)
            rows = torch.where(batch.labels == BACKGROUND, guess, rows)
        known = batch.labels != IGNORE
        shown = images.new_zeros(len(images), 1 + classes).scatter_(1, rows.flatten(1) + 1, 1.0)[:, 1:]
        new = channels_of(batch.labels, self.new)
        sums = region_sums(images, new, len(self.new), self.options.patch)
        sums |= ground_sums(images, (rows < 0) & known, self.options.patch)
        sums |= label_sums(maps, rows, known, classes)._asdict()
        sums["together"] = (shown.T @ shown).round().long()
        sums["size"] = torch.tensor(images.shape[2:], device=images.device) * len(images)
        sums["channels"] = torch.bincount(layer_of(maps))
        sums["batches"] = torch.ones((), dtype=torch.int64, device=images.device)
        return sums

    def keep(self, totals: dict[str, Tensor]) -> None:
        """Turn the sums into statistics; the synthetic images have done their work."""
        layers = torch.repeat_interleave(totals["channels"] // totals["batches"])
        self.statistics.update(totals, len(self.old), layers)
        self.images = self.labels = None

    # The rest -------------------------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return self.yields.device

    def _ids(self, class_ids: Sequence[int]) -> Tensor:
        return torch.tensor(class_ids, device=self._device)

    def predict(self, images: Tensor) -> Prediction:
        """Sigmoid scores of all classes seen so far; background where none exceeds 0.5."""
        return training.sigmoid_scores(self.network, images, self.class_ids)

    def kept(self) -> Sequence[Kept]:
        """Mean patches and masks, statistics, and a few impressions to look at."""
        source = "from the training images of the task that taught the class"
        items = [
            Kept(
                "class-means",
                "statistics",
                tuple(f"statistics.{name}" for name in SHOWN),
                f"of each class the mean patch around its regions and their mean mask, {source}",
                per_class=True,
                shows="images",
            ),
            Kept(
                "statistics",
                "statistics",
                (*(f"statistics.{name}" for name in BUFFERS), "yields"),
                "place, size, colour and company of each class's regions, colour and texture of the ground, mean and "
                f"variance of the network's feature maps, {source}; {self._yield_text()}",
                per_class=True,
            ),
        ]
        if self.previews is not None:
            text = "impressions of old classes that the network before this task was made to see; shown in the report"
            items.append(Kept("previews", "synthetic", ("previews",), text, shows="images"))
        return items

    def _yield_text(self) -> str:
        tried, used = self.yields.tolist()
        few = ", which is few: the network hardly sees its old classes any more" if 2 * used < tried else ""
        return f"of {tried} impressions made for this task {used} showed their layout and were used{few}"
