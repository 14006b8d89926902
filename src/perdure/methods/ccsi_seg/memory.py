"""What class impressions for segmentation keep, and the impressions themselves while a later task is under way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from perdure.data.case import Batch
from perdure.data.sampling import Batches
from perdure.engine.phases import Collect, Generate, Progress
from perdure.errors import PerdureError, UsageError
from perdure.files import read_tensors
from perdure.kept.items import Kept
from perdure.labels import BACKGROUND, IGNORE
from perdure.methods.ccsi_seg.impressions import Request, SynthesisOptions, plan_impressions, synthesise
from perdure.methods.ccsi_seg.measurements import (
    background_sums,
    label_sums,
    layer_of,
    recorded_maps,
    region_sums,
)
from perdure.methods.ccsi_seg.statistics import BUFFERS, SHOWN, Statistics, decode, encode
from perdure.methods.ccsi_seg.terms import agreement, edge_band, pseudo_labels
from perdure.methods.losses import channels_of
from perdure.networks.frozen import Frozen
from perdure.networks.segmenter import Segmenter, upsample
from perdure.streams.task import Task


class ImpressionMemory(nn.Module):
    """Statistics of all classes so far, and impressions of the old ones made from them and the old network.

    ``statistics`` crosses task boundaries; ``previews (K_old, n, C, H, W)`` uint8 are shown in the report; ``yields
    (2,)`` int64 says how many impressions were made for the latest task and how many showed their layout.
    ``images (M, C, H, W)`` uint8 and ``labels (M, H, W)`` int16 exist only while a later task is under way.

    Args:
        network: The method's network, whose kind is checked.
        options: How impressions are made.
        patch: Side of the mean patches in pixels.
        previews: Impressions per class shown in the report.
        optimise: Without, start images are replayed as they are painted, and nothing is asked of the old network.

    Attributes:
        old: Classes of earlier tasks; impressions are made of these.
        old_network: What they are made from, with evaluation statistics; ``None`` in the first task.

    Raises:
        UsageError: The network is not for images.
    """

    previews: Tensor | None
    yields: Tensor
    images: Tensor | None
    labels: Tensor | None

    def __init__(
        self, network: Segmenter, options: SynthesisOptions, patch: int, previews: int, optimise: bool = True
    ) -> None:
        super().__init__()
        if network.dims != 2:
            raise UsageError(
                f"class impressions for segmentation work on images, not in {network.dims}D",
                "use 2D data (volumes.view=slices for volumes), or replay nothing",
            )
        self.options, self.patch, self.shown, self.optimise = options, patch, previews, optimise
        self.statistics = Statistics()
        self.seen: tuple[int, ...] = ()
        self.old: tuple[int, ...] = ()
        self.new: tuple[int, ...] = ()
        self.old_network: Frozen[Segmenter] | None = None
        self.cases = 0  # training images of the task, from which the mean background is
        self.register_buffer("yields", torch.zeros(2, dtype=torch.int64))
        for name in ("previews", "images", "labels"):
            self.register_buffer(name, None)

    def begin(self, task: Task, network: Segmenter) -> None:
        """Freeze a copy of the network, which has not grown yet."""
        self.seen, self.old, self.new = task.seen, task.old, task.new
        self.images = self.labels = None
        self.old_network = Frozen(network) if task.index > 0 else None

    @property
    def teacher(self) -> Segmenter:
        """The old network."""
        assert self.old_network is not None
        return self.old_network.module

    @property
    def replayed(self) -> int:
        """Impressions of old classes that showed their layout."""
        return int(self.yields[1]) if self.old else 0

    # Impressions ----------------------------------------------------------------------------------------------

    def generate(self) -> Generate:
        """Phase that makes impressions of the old classes."""
        count = -(-self.options.per_class * len(self.old) // self.options.batch)
        return Generate("impressions", self, count, self.make, self.finish)

    def make(self, index: int, progress: Progress | None = None) -> Mapping[str, Tensor]:
        """Item ``index``: images and labels that passed, coded, and how many were tried."""
        options, teacher, ends = self.options, self.teacher, self.statistics.ends
        if progress is not None and progress.saved is not None:
            request = Request(*(progress.saved["request"][name].to(self.yields.device) for name in Request._fields))
        else:
            request = plan_impressions(self.statistics, options, len(self.old), index)
        if not self.optimise:
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
                "raise the steps of the synthesis, lower its least_dice, or set method.replay=none",
            )
        self.yields = torch.tensor([tried, len(images)], device=self.yields.device)
        self.images, self.labels = images.to(self.yields.device), labels.to(self.yields.device)
        count = self.shown
        if count:  # the first images that show each class; black where there are too few
            self.previews = self.images.new_zeros(len(self.old), count, *images.shape[1:])
            for row, class_id in enumerate(self.old):
                shown = self.images[(self.labels == class_id).flatten(1).any(1)][:count]
                self.previews[row, : len(shown)] = shown

    # What is stored -------------------------------------------------------------------------------------------

    def collect(
        self, task: Task, network: Segmenter, confidence: float, data: Callable[[], Batches], passes: int = 1
    ) -> Collect:
        """Phase that measures the task's images with the trained network.

        Args:
            task: The task under way.
            network: The trained network.
            confidence: From which certainty on it is believed about old classes where nothing is labelled.
            data: The task's images.
            passes: How often each of them comes in ``data``.
        """
        self.cases = len(task.train())  # asked again after a resume: it is no state
        measure, finish = partial(self.measure, network, confidence), partial(self.finish_measuring, passes)
        return Collect("statistics", network, data, measure, finish)

    def measure(self, network: Segmenter, confidence: float, batch: Batch) -> dict[str, Tensor]:
        """Sums over a batch: regions of new classes, background, co-occurrence, and moments of feature maps.

        Old classes are where nothing is labelled and the network predicts them with confidence.
        """
        images, classes = batch.images, len(self.seen)
        with recorded_maps(network.body) as maps:
            features = network.features(images)
        rows = channels_of(batch.labels, self.seen)
        if self.old:
            logits = upsample(network.classify(features)[:, : len(self.old)].float(), images.shape[2:])
            guess = channels_of(pseudo_labels(logits, self.old, confidence), self.seen)
            rows = torch.where(batch.labels == BACKGROUND, guess, rows)
        known = batch.labels != IGNORE
        shown = images.new_zeros(len(images), 1 + classes).scatter_(1, rows.flatten(1) + 1, 1.0)[:, 1:]
        new = channels_of(batch.labels, self.new)
        sums = region_sums(images, new, len(self.new), self.patch)
        sums |= background_sums(images, (rows < 0) & known, self.patch)
        sums |= label_sums(maps, rows, known, classes)._asdict()
        sums["co_occurrence"] = (shown.T @ shown).round().long()
        sums["size"] = torch.tensor(images.shape[2:], device=images.device) * len(images)
        sums["channels"] = torch.bincount(layer_of(maps))
        sums["batches"] = torch.ones((), dtype=torch.int64, device=images.device)
        return sums

    def finish_measuring(self, passes: int, totals: dict[str, Tensor]) -> None:
        """Turn the sums of so many passes into statistics; synthetic images are no longer needed."""
        layers = torch.repeat_interleave(totals["channels"] // totals["batches"])
        self.statistics.update(totals, len(self.old), layers, passes)
        self.images = self.labels = None

    def kept(self, prefix: str) -> list[Kept]:
        """Mean patches and masks, statistics, and a few impressions to look at."""
        source = "from the training images of the task that taught the class"
        tried, used = self.yields.tolist()
        averaged = self.statistics.regions[len(self.old) :]
        fewest = min([self.cases, *averaged[averaged > 0].tolist()])
        few = ", which is few: the network hardly recognises its old classes any more" if 2 * used < tried else ""
        items = [
            Kept(
                "class-means",
                "statistics",
                tuple(f"{prefix}statistics.{name}" for name in SHOWN),
                f"of each class the mean patch around its regions and their mean mask, {source}",
                per_class=True,
                shows="images",
                from_images=fewest,
            ),
            Kept(
                "impression-statistics",
                "statistics",
                (*(f"{prefix}statistics.{name}" for name in BUFFERS), f"{prefix}yields"),
                "place, size, colour and co-occurrence of each class's regions, colour and texture of the background, "
                f"mean and variance of the network's feature maps, {source}; of {tried} impressions made for this "
                f"task {used} showed their layout and were used{few}",
                per_class=True,
                from_images=fewest,
            ),
        ]
        if self.previews is not None:
            text = "impressions of old classes optimised against the network before this task; shown in the report"
            items.append(Kept("previews", "synthetic", (f"{prefix}previews",), text, shows="images"))
        return items
