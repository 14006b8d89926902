"""STAR: learn new classes from images, and old ones' share of the training distribution from statistics.

Chen, Cong, Luo, Ip, Kwong: "Saving 100x Storage: Prototype Replay for Reconstructing Training Sample Distribution
in Class-Incremental Semantic Segmentation", NeurIPS 2023. Of every class a unit prototype, a spread per channel, the
mean and deviation of the features' norms and a number of cells are kept, and one number of background cells.
Later tasks train *new* classifiers against features drawn from these, in the quantity in which the old classes
would have appeared (4.2), hold the features of old classes in place (OCFM, 4.3) and push new classes away from old
prototypes (SAD, 4.4). Old classifiers get no loss at all.

A class that comes back with labels in a later task (partial labels) is not learned again, for its classifier is frozen:
its labels take the place of the old network's pseudo-labels. A task without new classes has nothing to learn and is
refused.

With replayed samples (``replay``, not in the paper) half of each batch of a later task are labelled samples of earlier
ones. All terms above are about the distribution of the present task's data and see that alone, and so do all
statistics. The replayed samples have a term of their own: binary cross-entropy of the old classes that their task
annotates. Old classifiers stay frozen, for prototypes are of the features that they read: it teaches the features. New
classes learn nothing from replayed samples, because prototypes stand for old classes there already.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from perdure.data.case import Batch
from perdure.engine.phases import Collect, Phase, Terms
from perdure.kept.items import Kept
from perdure.labels import BACKGROUND
from perdure.methods import training
from perdure.methods.losses import annotates, channels_of, class_bce, negative_bce
from perdure.methods.method import Method
from perdure.methods.options import Setup
from perdure.methods.past import told
from perdure.methods.prediction import Prediction
from perdure.methods.replay import ReplayOptions, make_past, training_data, training_phases
from perdure.methods.star import replay, statistics
from perdure.methods.star.statistics import core_logits, core_pixels, grid_pixels
from perdure.methods.star.terms import balance, ocfm, replay_bce, sad
from perdure.networks.frozen import Frozen
from perdure.networks.segmenter import Segmenter
from perdure.streams.task import Task

Defect = Literal["spread_index", "channel_norm", "trunc", "sad_constant", "old_classifier_decay"]
KEPT_BUFFERS = ("prototypes", "spreads", "norms", "counts", "background_count")


class StarOptions(ReplayOptions):
    """Settings of STAR. The defaults are the published ones with the published code's defects fixed."""

    lambda_mbce: float = Field(1.0, ge=0, description="weight of balanced binary cross-entropy")
    lambda_ocfm: float = Field(5.0, ge=0, description="weight of holding old classes' features in place")
    lambda_sad: float = Field(0.05, ge=0, description="weight of pushing new classes off old prototypes")
    lambda_rivals: float = Field(
        0.0,
        ge=0,
        description="weight of telling the features that pixels of new classes belong to no old class; not in the "
        "paper, for images so unlike the earlier ones that old classifiers, which are frozen, win on new classes",
    )
    threshold: float = Field(0.5, description="raw logit above which the old network's prediction counts (Q2)")
    bookkeeping: Literal["auto", "overlap", "disjoint", "carried"] = Field(
        "auto",
        description="how counts are carried: overlap if images recur, else disjoint; carried is TPAMI's VOC rule",
    )
    replay_chunk: int = Field(4096, ge=1, description="replayed vectors in memory at a time")
    ignore_as_negative: bool = Field(True, description="count ignored pixels as negatives, as published (Q5)")
    compat: tuple[Defect, ...] = Field(
        (),
        description="published defects to bring back: spread_index (Q1: spread around another class's prototype), "
        "channel_norm (Q3: a norm per channel), trunc (Q6: rare classes are never replayed), "
        "sad_constant (Q7: absent classes add 1), old_classifier_decay (Q14: old classifiers shrink)",
    )


class Star(Method[StarOptions]):
    """Prototype replay.

    The statistics are buffers in learning order: ``prototypes (C, D)``, ``spreads (C, D)``, ``norms (C, 2)``,
    ``counts (C,)`` and ``background_count ()``, all float32: 8 D + 12 bytes per class and 4 more. Which class a row
    belongs to follows from the stream's tasks (``class_ids``), so ids take no space. ``replay_amounts (C_old,)``
    and ``repeat_factor ()`` exist only while a later task is under way.
    """

    Options = StarOptions
    recurring = "beside_new"
    prototypes: Tensor
    spreads: Tensor
    norms: Tensor
    counts: Tensor
    background_count: Tensor
    replay_amounts: Tensor | None
    repeat_factor: Tensor | None

    def __init__(self, setup: Setup[StarOptions]) -> None:
        super().__init__(setup)
        self.network = setup.network(Segmenter)
        self.past = make_past(self.options, self.network, self.training_options.batch_size)
        self.averages_images = self.options.replay == "impressions"
        self.most_classes = self.options.most_classes
        self.old: tuple[int, ...] = ()
        self.new: tuple[int, ...] = ()
        self.again: tuple[int, ...] = ()
        self.old_network: Frozen[Segmenter] | None = None
        width = self.network.width
        for name, shape in zip(KEPT_BUFFERS, [(0, width), (0, width), (0, 2), (0,), ()], strict=True):
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("replay_amounts", None)
        self.register_buffer("repeat_factor", None)

    def begin(self, task: Task) -> None:
        """Freeze a copy of the network, append the new classifier, freeze normalisation and old classifiers."""
        self.class_ids, self.old, self.new = task.seen, task.old, task.new
        self.again = tuple(c for c in task.old if c in task.annotated)
        self.replay_amounts = self.repeat_factor = None
        self.old_network = Frozen(self.network) if task.index > 0 else None
        self.past.begin(task)
        training.grow(self.network, task, self.training_options)
        if "old_classifier_decay" not in self.options.compat:
            self.network.freeze_old_classifiers()

    def phases(self, task: Task) -> Sequence[Phase]:
        """Count, train, then measure the new classes (spec 5.3)."""
        data = partial(training.batches, task, self.training_options)  # of this task alone, also with replay
        loss = self.later_loss if task.index > 0 else self.base_loss

        def keep_counts(totals: dict[str, Tensor]) -> None:
            # replay takes places of a batch: an epoch then has more steps, among which the prototypes are divided
            self._keep_counts(totals, training_data(self, self.past, task).steps(), task.recurs)

        return [
            Collect("counts", self, data, self._count, keep_counts),
            *training_phases(self, self.past, self.network, task, loss),
            Collect("prototypes", self, data, self._measure_prototypes, self._keep_prototypes),
            Collect("spreads", self, data, self._measure_spreads, self._keep_spreads),
        ]

    # The losses -----------------------------------------------------------------------------------------------

    def base_loss(self, batch: Batch) -> Terms:
        """4.1: binary cross-entropy on the images."""
        logits = self.network.classify(self.network.features(batch.images), first=-1)  # the newest classifier alone
        return {"current": self.options.lambda_mbce * self._current(logits, batch).sum()}

    def later_loss(self, batch: Batch) -> Terms:
        """4.5: balanced binary cross-entropy of the new classes, OCFM and SAD; with replay that of old ones too."""
        features = self.network.features(batch.images)
        if batch.parts is None or not self.past.taught:
            return self._present(batch, features)
        ours = batch.parts.eq(0)
        batch = told(batch, self.past)
        terms = self._present(batch.where(ours), features[ours])
        return terms | {"past": self.options.lambda_mbce * self._replayed(batch.where(~ours), features[~ours])}

    def _replayed(self, batch: Batch, features: Tensor) -> Tensor:
        """Binary cross-entropy of old classes on replayed samples, each where its labels tell the class."""
        logits = self.network.classify(features, channels=range(len(self.old)))
        weight, keep = self.training_options.pos_weight, self.options.ignore_as_negative
        return class_bce(logits, batch.labels, self.old, weight, keep, batch.annotated).sum()

    def _present(self, batch: Batch, features: Tensor) -> Terms:
        """The terms of the paper, on images of the task."""
        options = self.options
        old_features, pseudo_labels = self._ask_old_network(batch)
        logits = self.network.classify(features, first=-1)
        labels = self._unless_again(core_pixels(batch.labels, self.network.stride))
        unlabelled = labels == BACKGROUND

        # 4.2: current images, replayed prototypes, repeated true background; shares of the grid's cells S
        replayed, number = self._replay()
        true_background = unlabelled[-1] & (pseudo_labels[-1] == 0)
        cells = true_background.numel()
        certain = true_background
        if batch.annotated is not None:  # a pixel says nothing about classes that its image does not label
            certain = certain.unsqueeze(1) & annotates(batch.annotated, self.new, certain.dim() - 1)
        assert self.repeat_factor is not None
        mbce = balance(
            self._current(logits, batch),
            replayed,
            negative_bce(logits, certain),
            number / cells,
            self.repeat_factor * true_background.sum() / cells,
        )
        # 4.3: where the labels say nothing and the old network sees an old class
        kept_in_place = ocfm(features, old_features, (unlabelled & (pseudo_labels > 0)).float().mean(0))
        # 4.4
        channels = channels_of(labels, self.new)
        away = sad(features, channels, len(self.new), self.prototypes, "sad_constant" in options.compat)
        ours = {}
        if options.lambda_rivals:
            of_new = (channels >= 0).all(0)
            old_logits = self.network.classify(features, channels=range(len(self.old)))
            ours["rivals"] = options.lambda_rivals * negative_bce(old_logits, of_new).sum()
        current = options.lambda_mbce * mbce.current
        if "old_classifier_decay" in options.compat:
            # Q14: a gradient of zero, with which the optimiser decays the old classifiers as published
            current = current + torch.stack([p.sum() for p in self.network.classifiers[:-1].parameters()]).sum() * 0.0
        return {
            "current": current,
            "replay": options.lambda_mbce * mbce.replay,
            "background": options.lambda_mbce * mbce.background,
            "ocfm": options.lambda_ocfm * kept_in_place,
            "sad": options.lambda_sad * away,
            **ours,
        }

    def _current(self, logits: Tensor, batch: Batch) -> Tensor:
        """L_cur ``(C_new,)`` at full resolution."""
        weight, keep = self.training_options.pos_weight, self.options.ignore_as_negative
        return class_bce(logits, batch.labels, self.new, weight, keep, batch.annotated)

    def _replay(self) -> tuple[Tensor, Tensor]:
        """L_rep ``(C_new,)`` on freshly drawn features, and how many they are."""
        compat = self.options.compat
        assert self.replay_amounts is not None
        shared = torch.distributed.is_available() and torch.distributed.is_initialized()
        processes = torch.distributed.get_world_size() if shared else 1
        numbers = replay.whole(self.replay_amounts, processes, "trunc" in compat)
        drawn = replay.chunks(
            self.prototypes, self.spreads, self.norms, numbers, self.options.replay_chunk, "channel_norm" in compat
        )
        newest = self.network.classifiers[-1]
        weight, bias = newest.get_parameter("weight"), newest.get_parameter("bias")
        return replay_bce(drawn, weight.flatten(1), bias), numbers.sum()

    @torch.no_grad()
    def _ask_old_network(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The old network's features ``(N, D, *s)`` and pseudo-labels q at the core pixels ``(P, N, *s)``.

        Where an image annotates an old class, its labels say where it is, and not the old network.
        """
        assert self.old_network is not None
        old = self.old_network.module
        features = old.features(batch.images)
        logits = core_logits(old.classify(features), self.network.stride)
        if not self.again:
            return features, statistics.pseudo_labels(logits, self.options.threshold)
        told = torch.tensor([c in self.again for c in self.old], device=logits.device).expand(len(batch.images), -1)
        if batch.annotated is not None:
            told = told & batch.annotated[:, list(self.old)]
        logits = logits.masked_fill(told.view(1, *told.shape, *[1] * (logits.dim() - 3)), -torch.inf)
        rows = channels_of(core_pixels(batch.labels, self.network.stride), self.old)
        return features, torch.where(rows < 0, statistics.pseudo_labels(logits, self.options.threshold), rows + 1)

    def _unless_again(self, labels: Tensor) -> Tensor:
        """Labels without classes of earlier tasks: such pixels are background here, their pseudo-label is the truth."""
        return torch.where(channels_of(labels, self.again) < 0, labels, BACKGROUND) if self.again else labels

    # What is stored -------------------------------------------------------------------------------------------

    def _codes(self, batch: Batch) -> Tensor:
        """Row of the new class of each grid cell, -1 for all others."""
        return channels_of(grid_pixels(batch.labels, self.network.stride), self.new)

    def _count(self, batch: Batch) -> dict[str, Tensor]:
        """Cells of background and of each new class; at later tasks also M of 3.2."""
        labels = grid_pixels(batch.labels, self.network.stride)
        found = {"labels": statistics.tally(channels_of(labels, (BACKGROUND, *self.new)), 1 + len(self.new))}
        if self.old:
            pseudo_labels = self._ask_old_network(batch)[1][-1]
            unlabelled = torch.where(self._unless_again(labels) == BACKGROUND, pseudo_labels, -1)
            found["predicted"] = statistics.tally(unlabelled, 1 + len(self.old))
        return found

    def _keep_counts(self, totals: dict[str, Tensor], steps: int, recurs: bool) -> None:
        """Append the new classes' counts and, at later tasks, work out what to replay (3.2)."""
        labels = totals["labels"].to(self.counts)
        old, background = self.counts[: len(self.old)], labels[0]
        if self.old:
            chosen = self.options.bookkeeping
            rule: replay.Rule = ("overlap" if recurs else "disjoint") if chosen == "auto" else chosen
            known = replay.Counts(
                old.double(), self.background_count.double(), totals["predicted"].to(old.device).double()
            )
            amounts = replay.RULES[rule](known, len(self.new), steps)
            # A class that was never seen has no prototype to draw around, whatever the old network predicts.
            drawable = self.prototypes[: len(self.old)].any(1)
            self.replay_amounts = (amounts.replays * drawable).float()
            self.repeat_factor = amounts.repeat.float()
            old, background = amounts.old.float(), amounts.background.float()
        self.counts = torch.cat([old, labels[1:]])
        self.background_count = background.clone()

    def _measure_prototypes(self, batch: Batch) -> dict[str, Tensor]:
        return statistics.feature_sums(self.network.features(batch.images), self._codes(batch), len(self.new))

    def _keep_prototypes(self, totals: dict[str, Tensor]) -> None:
        old, (prototypes, norms) = len(self.old), statistics.prototypes_and_norms(totals)
        self.prototypes = torch.cat([self.prototypes[:old], prototypes.to(self.prototypes)])
        self.norms = torch.cat([self.norms[:old], norms.to(self.norms)])

    def _measure_spreads(self, batch: Batch) -> dict[str, Tensor]:
        # Q1: the published code measures around the prototype in row j of all classes instead of the new ones.
        first = 0 if "spread_index" in self.options.compat else len(self.old)
        centres = self.prototypes[first : first + len(self.new)]
        return statistics.spread_sums(self.network.features(batch.images), self._codes(batch), centres)

    def _keep_spreads(self, totals: dict[str, Tensor]) -> None:
        self.spreads = torch.cat([self.spreads[: len(self.old)], statistics.spreads_from(totals).to(self.spreads)])
        self.replay_amounts = self.repeat_factor = None

    # The finished model ---------------------------------------------------------------------------------------

    def predict(self, images: Tensor) -> Prediction:
        """Sigmoid scores of all classes seen so far; background where none exceeds 0.5 (1.7)."""
        return training.sigmoid_scores(self.network, images, self.class_ids)

    @property
    def replayed(self) -> int:
        """Samples of earlier tasks that the present task trained on."""
        return self.past.replayed(self)

    def kept(self) -> Sequence[Kept]:
        """The statistics: 2,060 bytes per class at width 256, and 4; with replay what that keeps."""
        text = (
            "of each class a unit mean feature, its spread, mean and deviation of feature norms, number of grid cells; "
            "one number of background cells; from the training images of the task that taught the class"
        )
        return [Kept("statistics", "statistics", KEPT_BUFFERS, text, per_class=True), *self.past.kept("past.")]
