"""CCSI: learn new classes with replayed images of the old ones, synthesised from the frozen model itself.

Ayromlou, Tsang, Abolmaesumi, Li: "CCSI: Continual Class-Specific Impression for Data-free Class Incremental
Learning", Medical Image Analysis 2024, and "Class Impression for Data-free Incremental Learning", MICCAI 2022. Of
every class the mean of its training images is kept, and with Continual Normalization the moments of its features.
Before the next task, images of old classes are optimised from those means until the frozen network takes them for
their class and its normalisation layers receive the statistics of real images. The update learns new images and
impressions together, with cosine logits, a margin between old and new classes, features held in direction, and
centroids of unlabelled images drawn to those of labelled ones.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from perdure.data.case import Batch
from perdure.data.dataset import Joined, members
from perdure.data.sampling import Batches, Mix
from perdure.data.tensors import tensor_view
from perdure.engine.phases import Collect, Generate, Phase, Progress, Terms, Train
from perdure.errors import UsageError
from perdure.files import read_tensors
from perdure.kept.items import Kept
from perdure.methods import training
from perdure.methods.ccsi import terms
from perdure.methods.ccsi.impressions import Request, plan_groups, synthesise
from perdure.methods.ccsi.memorisation import Neighbours
from perdure.methods.ccsi.memory import (
    Memory,
    append_rows,
    class_moment_sums,
    class_moments,
    class_sums,
    mean_directions,
    mean_images,
)
from perdure.methods.ccsi.options import CcsiOptions
from perdure.methods.losses import channels_of
from perdure.methods.method import Method
from perdure.methods.options import Setup
from perdure.methods.prediction import Prediction
from perdure.networks.classifier import Classifier
from perdure.networks.continual_norm import GROUP_BUFFERS, continual_norms
from perdure.networks.frozen import Frozen
from perdure.networks.layers import without_updates
from perdure.seeds import derive_seed
from perdure.streams.summary import class_images
from perdure.streams.task import Task

WORKING: Final = ("counts", "replay_images", "replay_labels", "checked_images", "checked_labels", "centroids")
COLLECT_BATCH: Final = 128
SINGLE: Final = (
    "means and variances of groups of channels for each single image of the last full training batch, in every "
    "normalisation layer; test images, where the unlabelled pass moves statistics (as published)"
)
_log = logging.getLogger(__name__)


class Ccsi(Method[CcsiOptions]):
    """Class impressions for classification.

    ``memory`` holds what crosses the boundary of a task. The buffers of :data:`WORKING` exist only within one: the
    ``counts (new,)`` of the task's images, the images replayed for old classes and the impressions compared with
    training images (both with their channels), and the moving centroids ``(2, K, K)`` of labelled and unlabelled
    images.
    """

    Options = CcsiOptions
    kinds = frozenset({"classification"})
    averages_images = True
    recurring = "refused"
    counts: Tensor | None
    replay_images: Tensor | None
    replay_labels: Tensor | None
    checked_images: Tensor | None
    checked_labels: Tensor | None
    centroids: Tensor | None

    def __init__(self, setup: Setup[CcsiOptions]) -> None:
        super().__init__(setup)
        self.network, statistics = setup.network(Classifier), self.options.synthesis.statistics
        if self.options.replay == "impressions" and statistics != "none" and not continual_norms(self.network):
            raise UsageError(
                f"method.synthesis.statistics is {statistics}, but the network has no Continual Normalization",
                "set network.norm=continual, or method.synthesis.statistics=none",
            )
        self.all_options = self.options
        self.memory = Memory()
        self.seed = int(torch.randint(2**31, ()))  # of the impressions; drawn from the run's seed
        self.old: tuple[int, ...] = ()
        self.new: tuple[int, ...] = ()
        self.task, self.step, self.steps_per_epoch = 0, 1, 1
        self.fewest: int | None = None  # training images of the task's rarest class
        self.contrasts = False  # whether a step needs unlabelled images
        self.old_network: Frozen[Classifier] | None = None
        # Impressions made before their task, by task and item. After a resume they are made again, the same ones.
        self._early: dict[tuple[int, int], Mapping[str, Tensor]] = {}
        for name in WORKING:
            self.register_buffer(name, None)

    def begin(self, task: Task) -> None:
        """Freeze a copy of the network, append the new classifier, freeze the old ones."""
        self.task, self.options = task.index, self.all_options.at(task.index)
        self.class_ids, self.old, self.new = task.seen, task.old, task.new
        if task.index == 1:
            self.step = len(task.new)  # the regular size of a step, which the last task may fall short of
        self.old_network = Frozen(self.network) if task.index > 0 else None
        self.contrasts = bool(self.old) and self.options.lambda_idc > 0
        for name in WORKING:
            setattr(self, name, None)
        training.grow(self.network, task, self.training_options)
        if self.options.freeze_old:
            self.network.freeze_old_classifiers()

    def phases(self, task: Task) -> Sequence[Phase]:
        """Measure the new classes, make impressions of the old ones, train, then make those that the next task replays.

        The last are made already now because only now can they be compared with the training images.
        """
        self._check_pool(task)
        self.fewest = min(class_images(task).values())  # asked again after a resume: it is no state
        impressions = self.options.replay == "impressions"

        def in_order() -> Batches:
            return Batches(task.train(), COLLECT_BATCH, shuffle=False, drop_last=False)

        def moment_sums(batch: Batch) -> dict[str, Tensor]:
            codes = channels_of(batch.labels, self.new)
            return class_moment_sums(self.network, batch.images, codes, len(self.new))

        def finish_moments(sums: dict[str, Tensor]) -> None:
            self.memory.moments = append_rows(self.memory.moments, class_moments(sums))

        phases: list[Phase] = [Collect("classes", self, in_order, self._class_sums, self._finish_classes)]
        if impressions and self.old:
            phases.append(self._generate("impressions", task.index))
        phases.append(self._train(task))
        if impressions and self.all_options.at(task.index + 1).synthesis.statistics == "class":
            phases.append(Collect("moments", self, in_order, moment_sums, finish_moments))
        if impressions and self.options.checked != "none":
            phases += [self._generate("next impressions", task.index + 1), self._compare(task)]
        return phases

    def _check_pool(self, task: Task) -> None:
        """Raise UsageError unless the protocol grants the unlabelled images that the contrastive loss asks for."""
        options = self.all_options.at(task.index + 1)
        if options.idc_source != "pool" or options.lambda_idc == 0:
            return
        pool = task.pool()
        if pool is None:
            raise UsageError("method.idc_source is pool, but the stream grants no unlabelled images",
                             "set stream.pool=val, or test with method.compat=[transductive]")  # fmt: skip
        if pool.split == "test" and "transductive" not in options.compat:
            raise UsageError("stream.pool is test: test images would take part in training",
                             "set stream.pool=val, or method.compat=[transductive] to do as published")  # fmt: skip
        if pool.split == "test":
            _log.warning("unlabelled test images take part in training, as published: the figures are transductive")

    # Statistics of the new classes --------------------------------------------------------------------------------

    def _class_sums(self, batch: Batch) -> dict[str, Tensor]:
        imprint = self.options.imprint and bool(self.old)
        features = self.network.features(batch.images) if imprint else None
        return class_sums(batch.images, channels_of(batch.labels, self.new), len(self.new), features)

    def _finish_classes(self, sums: dict[str, Tensor]) -> None:
        self.counts = sums["counts"]
        if "directions" in sums:
            self.network.imprint(mean_directions(sums))
        if self.old and self.options.replay == "means":
            assert self.memory.means is not None
            self.replay_labels = self._plan(self.task).flatten().to(self.memory.means.device)
            self.replay_images = self.memory.means[self.replay_labels].float() / 255
        self.memory.means = append_rows(self.memory.means, mean_images(sums))

    @property
    def replayed(self) -> int:
        """Images of old classes: impressions, or class means."""
        return self._plan(self.task).numel() if self.old and self.options.replay != "none" else 0

    # Impressions --------------------------------------------------------------------------------------------------

    def _plan(self, task: int) -> Tensor:
        """Channel of every image that a task replays ``(groups, group_size)``: this task, or the next."""
        options, known = self.all_options.at(task), len(self.old if task == self.task else self.class_ids)
        seed = derive_seed(self.seed, "task", task)
        return plan_groups(options.groups_before(task, known), known, options.synthesis, seed)

    def _generate(self, name: str, task: int) -> Generate:
        """Phase that makes the impressions that a task replays: in it, or early, at the end of the task before.

        An item holds ``synthesis.groups_at_once`` groups.
        """
        plan, early, options = self._plan(task), task > self.task, self.all_options.at(task).synthesis
        size = options.groups_at_once
        count = 1 if early and self.options.checked == "first" else -(-len(plan) // size)

        def make(item: int, progress: Progress) -> Mapping[str, Tensor]:
            if (task, item) in self._early:
                return self._early.pop((task, item))
            assert self.memory.means is not None
            known, moments = int(plan.max()) + 1, self.memory.moments
            numbers = range(len(plan))[item * size : (item + 1) * size]
            request = Request(
                plan[numbers.start : numbers.stop],
                numbers,
                derive_seed(self.seed, "task", task),
                self.memory.means[:known].float() / 255,
                moments[:known] if moments is not None and options.statistics == "class" else None,
            )
            made = synthesise(self.network if early else self._teacher, request, options, progress)
            return {"images": made.images, "labels": made.labels}

        def finish(files: Iterable[Path]) -> None:
            made, device = [read_tensors(file) for file in files], self.network.head.scale.device
            images, labels = (torch.cat([item[name] for item in made]).to(device) for name in ("images", "labels"))
            if early:  # the new classes' are compared with training images
                self._early = dict(zip(((task, item) for item in range(count)), made, strict=True))
                new = labels >= len(self.old)
                self.checked_images, self.checked_labels = images[new], labels[new] - len(self.old)
            else:
                self.replay_images, self.replay_labels = images, labels
            if early or self.options.checked == "none":
                self.memory.show(images.cpu(), labels.cpu(), len(self.class_ids), self.options.previews)

        return Generate(name, self, count, make, finish)

    @property
    def _teacher(self) -> Classifier:
        assert self.old_network is not None
        return self.old_network.module

    def _compare(self, task: Task) -> Collect:
        """Phase that measures how close impressions of the new classes come to training images."""
        neighbours: list[Neighbours] = []

        def data() -> Batches:
            assert self.checked_images is not None
            assert self.checked_labels is not None
            train = task.train()
            neighbours.append(Neighbours(self.checked_images, self.checked_labels, train, self.new))
            return Batches(train, COLLECT_BATCH, shuffle=False, drop_last=False)

        def finish(sums: dict[str, Tensor]) -> None:
            impressions, reference = neighbours[-1].distances(sums)
            self.memory.impressions = append_rows(self.memory.impressions, impressions)
            self.memory.reference = append_rows(self.memory.reference, reference)
            self.checked_images = self.checked_labels = None

        return Collect("neighbours", self, data, lambda batch: neighbours[-1].measure(batch), finish)

    # The update ---------------------------------------------------------------------------------------------------

    def _train(self, task: Task) -> Train:
        """Phase ``train``: new images, and those replayed for old classes."""

        def after_step(step: int) -> None:
            if (step + 1) % self.steps_per_epoch == 0:
                self.centroids = None  # 4.6: they start again with every epoch

        def finish() -> None:
            self.counts = self.replay_images = self.replay_labels = self.centroids = None

        data = partial(self._batches, task)
        phase = training.train_phase(self, self.network, task, self.training_options, self.loss, data)
        return replace(phase, after_step=after_step, finish=finish)

    def _batches(self, task: Task) -> Batches | Mix:
        """4.1: new images, unlabelled ones for the contrastive loss (4.6), and replayed ones, each with its own size.

        With the sampler in ``balance`` replayed images have ``share`` of the labelled ones: exactly, or with
        ``replacement`` on average, as published. Without it every image comes once per epoch.
        """
        options, size, new = self.options, self.training_options.batch_size, task.train()
        labelled = Batches(new, size, drop_last=False, weights=torch.ones(len(new)) if options.replacement else None)
        parts: list[Batches] = []
        if self.replay_images is not None and self.replay_labels is not None:
            ids = torch.as_tensor(self.class_ids, dtype=torch.int16)[self.replay_labels.cpu()]
            replayed = tensor_view(self.replay_images, ids, task.space)
            both = Joined((*members(new), replayed))
            if "sampler" not in options.balance:
                labelled = Batches(both, size, drop_last=False)
            elif options.replacement:
                weight = len(new) * options.share / (len(replayed) * (1 - options.share))
                weights = torch.cat([torch.ones(len(new)), torch.full((len(replayed),), weight)])
                draws = int(len(new) / (1 - options.share))
                labelled = Batches(both, size, drop_last=False, weights=weights, draws=draws)
            else:
                old = max(1, min(round(size * options.share), size - 1))
                labelled, parts = Batches(new, max(1, size - old), drop_last=False), [Batches(replayed, old)]
        if self.contrasts:
            unlabelled = task.pool() if options.idc_source == "pool" else new
            assert unlabelled is not None
            parts.insert(0, Batches(unlabelled, size))
        self.steps_per_epoch = labelled.steps()
        return Mix((labelled, *parts)) if parts else labelled

    def loss(self, batch: Batch) -> Terms:
        """4.7: cross-entropy, less-forget distillation, margin and contrastive loss, each with its weight."""
        options, old, found = self.options, len(self.old), dict[str, Tensor]()
        unlabelled = batch.parts == (1 if self.contrasts else -1)
        images, targets = batch.images[~unlabelled], channels_of(batch.labels[~unlabelled], self.class_ids)
        features = self.network.features(images)
        cosines = self.network.cosines(features).float()
        weights = self._class_weights() if "weights" in options.balance else None
        found["ce"] = terms.weighted_ce(cosines * self.network.head.scale, targets, weights)
        if old and options.lambda_lf > 0:
            with torch.no_grad():
                before = self._teacher.features(images)
            weight = terms.less_forget_weight(options.lambda_lf, old, self.step)
            found["lf"] = weight * terms.less_forget(features, before)
        if old and options.lambda_margin > 0 and options.replay != "none":
            ranked = terms.margin_ranking(cosines, targets, old, options.margin, options.margin_top)
            found["margin"] = options.lambda_margin * ranked
        if self.contrasts:
            # The unlabelled pass leaves the running statistics alone unless asked to (J4).
            with nullcontext() if options.idc_moves_statistics else without_updates(self.network):
                others = self.network.cosines(self.network.features(batch.images[unlabelled])).float()
            now = torch.stack([terms.centroids(cosines, targets), terms.centroids(others, others.argmax(1))])
            earlier = torch.zeros_like(now) if self.centroids is None else self.centroids
            source, target = moved = terms.moving(earlier, now, options.idc_momentum)
            found["idc"] = options.lambda_idc * terms.idc(source, target, options.idc_temperature)
            self.centroids = moved.detach()
        return found

    def _class_weights(self) -> Tensor:
        """Weights of 4.2 over all images, new and replayed ones."""
        assert self.counts is not None
        counts = torch.zeros(len(self.class_ids), dtype=torch.int64, device=self.counts.device)
        counts[len(self.old) :] = self.counts
        if self.replay_labels is not None:
            counts += torch.bincount(self.replay_labels, minlength=len(counts))
        return terms.class_weights(counts)

    # The finished model -------------------------------------------------------------------------------------------

    def predict(self, images: Tensor) -> Prediction:
        """Softmax over all classes seen so far."""
        return training.softmax_scores(self.network, images, self.class_ids)

    def kept(self) -> Sequence[Kept]:
        """Class means, moments and distances, and a few impressions for the report.

        With ``network.group_statistics`` also the published moments of single images, which are named as such.
        """
        single = tuple(name for name, _ in self.named_buffers() if name.endswith(GROUP_BUFFERS))
        extra = [Kept("group-statistics", "statistics", single, SINGLE)] if single else []
        return [*self.memory.kept(self.fewest), *extra]
