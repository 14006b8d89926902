"""CCSI: learn new classes beside images of the old ones that the frozen model itself was made to show.

Ayromlou, Tsang, Abolmaesumi, Li: "CCSI: Continual Class-Specific Impression for Data-free Class Incremental
Learning", Medical Image Analysis 2024, and "Class Impression for Data-free Incremental Learning", MICCAI 2022. Of
every class the mean of its training images is kept, and with Continual Normalization the moments of its features.
Before the next task, images of old classes are optimised from those means until the frozen network takes them for
their class and they move its normalisation layers as real images did. The update learns new images and impressions
together, with cosine logits, a margin between old and new classes, features held in direction, and centroids of
unlabelled images drawn to those of labelled ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Final, Self

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from perdure.data.dataset import Batch, Dataset
from perdure.data.source import Kind
from perdure.engine.phases import Batches, Collect, Generate, Phase, Progress, Terms, Train
from perdure.errors import UsageError
from perdure.files import read_tensors
from perdure.kept.items import Kept
from perdure.methods import training
from perdure.methods.ccsi import gather, terms
from perdure.methods.ccsi.memory import Memory
from perdure.methods.ccsi.mixture import first_batches, mixed_batches
from perdure.methods.ccsi.moments import class_moment_sums, class_moments
from perdure.methods.ccsi.neighbours import Neighbours
from perdure.methods.ccsi.options import CcsiOptions
from perdure.methods.ccsi.studio import ImpressionGenerator, frozen
from perdure.methods.ccsi.update import Update
from perdure.methods.losses import channels_of
from perdure.methods.method import Prediction
from perdure.methods.options import Setup
from perdure.networks.classifier import Classifier
from perdure.networks.continual_norm import GROUP_BUFFERS, continual_norms
from perdure.seeds import derive_seed
from perdure.streams.task import Task

WORKING: Final = ("counts", "replay_images", "replay_labels", "checked_images", "checked_labels", "centroids")
LOOK_AT_ONCE: Final = 128
SINGLE: Final = (
    "means and variances of groups of channels for each single image of the last full training batch, in every "
    "normalisation layer; test images, where the unlabelled pass moves statistics (as published)"
)
_log = logging.getLogger(__name__)


class Ccsi(nn.Module):
    """Class impressions for classification.

    ``memory`` holds what crosses the boundary of a task. The buffers of :data:`WORKING` exist only within one: the
    ``counts (new,)`` of the task's images, the images that stand for old classes, the impressions that are held
    against training images (both with their channels), and the moving centroids ``(2, K, K)`` of labelled and
    unlabelled images.
    """

    Options: ClassVar[type[BaseModel]] = CcsiOptions
    kinds: ClassVar[frozenset[Kind]] = frozenset({"classification"})
    sees_all_tasks: ClassVar[bool] = False
    counts: Tensor | None
    replay_images: Tensor | None
    replay_labels: Tensor | None
    checked_images: Tensor | None
    checked_labels: Tensor | None
    centroids: Tensor | None

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        assert isinstance(setup.options, CcsiOptions)
        network = setup.network(Classifier)
        if self._wants_group_moments(setup.options) and not continual_norms(network):
            raise UsageError(
                f"method.synthesis.statistics is {setup.options.synthesis.statistics}, but the network has no "
                "Continual Normalization",
                "set network.norm=continual, or method.synthesis.statistics=none",
            )
        self.all_options = self.options = setup.options
        self.training_options = setup.training
        self.network = network
        self.memory = Memory()
        self.seed = int(torch.randint(2**31, ()))  # of the impressions; drawn from the run's seed
        self.class_ids: tuple[int, ...] = ()
        self.old: tuple[int, ...] = ()
        self.new: tuple[int, ...] = ()
        self.task, self.step = 0, 1
        # In a tuple, so that the frozen copy is no submodule: it is neither trained nor saved.
        self._old_network: tuple[Classifier, ...] = ()
        # Impressions made before their task, by task and lot. After a resume they are made again, the same ones.
        self._early: dict[tuple[int, int], Mapping[str, Tensor]] = {}
        for name in WORKING:
            self.register_buffer(name, None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the frozen copy along with the module."""
        for network in self._old_network:
            network._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def begin(self, task: Task) -> None:
        """Freeze a copy of the network, append the new classifier, freeze the old ones."""
        self.task, self.options = task.index, self.all_options.at(task.index)
        self.class_ids, self.old, self.new = task.seen, task.old, task.new
        if task.index == 1:
            self.step = len(task.new)  # the regular size of a step, which the last task may fall short of
        self._old_network = (frozen(self.network),) if task.index > 0 else ()
        for name in WORKING:
            setattr(self, name, None)
        training.grow(self.network, task, self.training_options)
        if self.options.freeze_old:
            self.network.freeze_old_classifiers()

    def phases(self, task: Task) -> Sequence[Phase]:
        """Look at the new classes, make images of the old ones, learn, then make those that the next task replays.

        The last are made already now because only now the training images can be held against them.
        """
        self._check_pool(task)
        following = self.all_options.at(task.index + 1)
        impressions = self.options.replay == "impressions"

        def in_order() -> Batches:
            return Batches(task.train(), LOOK_AT_ONCE, shuffle=False, drop_last=False)

        stages: list[Phase] = [Collect("classes", self, in_order, self._look, self._keep_look)]
        if impressions and self.old:
            stages.append(self._generate("impressions", task.index, lambda: self._old_network[0], self._set_replay))
        stages.append(self._train(task))
        if impressions and following.synthesis.statistics == "class":
            stages.append(Collect("moments", self, in_order, self._measure_moments, self._keep_moments))
        if impressions and self.options.checked != "none":
            now = lambda: frozen(self.network)  # noqa: E731
            stages.append(self._generate("next impressions", task.index + 1, now, self._set_checked))
            stages.append(self._compare(task))
        return stages

    @staticmethod
    def _wants_group_moments(options: CcsiOptions) -> bool:
        return options.replay == "impressions" and options.synthesis.statistics != "none"

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

    # Looking at the new classes -----------------------------------------------------------------------------------

    def _look(self, batch: Batch) -> dict[str, Tensor]:
        features = self.network.features(batch.images) if self._imprints else None
        return gather.class_sums(batch.images, channels_of(batch.labels, self.new), len(self.new), features)

    def _keep_look(self, sums: dict[str, Tensor]) -> None:
        self.counts = sums["counts"]
        if self._imprints:
            self.network.imprint(gather.mean_directions(sums))
        if self.old and self.options.replay == "means":
            self._set_replay(*self._studio(self.task).means_alone(self.memory))
        self.memory.add_means(gather.mean_images(sums))

    @property
    def _imprints(self) -> bool:
        return self.options.imprint and bool(self.old)

    def _measure_moments(self, batch: Batch) -> dict[str, Tensor]:
        codes = channels_of(batch.labels, self.new)
        return class_moment_sums(self.network, batch.images, codes, len(self.new))

    def _keep_moments(self, sums: dict[str, Tensor]) -> None:
        self.memory.add_moments(class_moments(sums))

    # Making and checking impressions ------------------------------------------------------------------------------

    def _studio(self, task: int) -> ImpressionGenerator:
        """Where the images that stand for the old classes of a task are made."""
        options, known = self.all_options.at(task), len(self.old if task == self.task else self.class_ids)
        return ImpressionGenerator(
            options.synthesis, known, options.groups_before(task, known), derive_seed(self.seed, "task", task)
        )

    def _generate(
        self, name: str, task: int, teacher: Callable[[], Classifier], take: Callable[[Tensor, Tensor], None]
    ) -> Generate:
        """Phase that makes the impressions that a task replays: in it, or early, at the end of the task before."""
        studio = self._studio(task)
        early = task > self.task
        first_only = early and self.options.checked == "first"

        def make(lot: int, progress: Progress) -> Mapping[str, Tensor]:
            ready = self._early.pop((task, lot), None)
            return ready if ready is not None else studio.make(lot, teacher(), self.memory, progress)

        def finish(files: Iterable[Path]) -> None:
            made = [read_tensors(file) for file in files]
            if early:
                self._early = {(task, lot): item for lot, item in enumerate(made)}
            take(torch.cat([item["images"] for item in made]), torch.cat([item["labels"] for item in made]))

        return Generate(name, self, 1 if first_only else studio.lots, make, finish)

    def _set_replay(self, images: Tensor, labels: Tensor) -> None:
        device = self.network.head.scale.device
        self.replay_images, self.replay_labels = images.to(device), labels.to(device)
        if self.options.checked == "none" and self.options.replay == "impressions":
            self.memory.show(images, labels, len(self.class_ids), self.options.previews)

    def _set_checked(self, images: Tensor, labels: Tensor) -> None:
        """Keep the new classes' impressions for the comparison, and some of every class for the report."""
        device = self.network.head.scale.device
        self.memory.show(images, labels, len(self.class_ids), self.options.previews)
        mine = labels >= len(self.old)
        self.checked_images, self.checked_labels = images[mine].to(device), labels[mine].to(device) - len(self.old)

    def _compare(self, task: Task) -> Collect:
        """Phase that measures how close impressions of the new classes come to training images."""
        neighbours: list[Neighbours] = []

        def data() -> Batches:
            assert self.checked_images is not None
            assert self.checked_labels is not None
            view = task.train()
            neighbours.append(Neighbours(self.checked_images, self.checked_labels, view, self.new))
            return Batches(view, LOOK_AT_ONCE, shuffle=False, drop_last=False)

        def measure(batch: Batch) -> dict[str, Tensor]:
            return neighbours[-1].measure(batch)

        def finish(sums: dict[str, Tensor]) -> None:
            self.memory.add_distances(*neighbours[-1].distances(sums))
            self.checked_images = self.checked_labels = None

        return Collect("neighbours", self, data, measure, finish)

    # The update ---------------------------------------------------------------------------------------------------

    def _train(self, task: Task) -> Train:
        """Phase ``train``: new images, and those that stand for old classes."""
        steps = [1]

        def data() -> Batches:
            batches = self._batches(task.train())
            steps[0] = batches.steps()
            return batches

        def after_step(step: int) -> None:
            if (step + 1) % steps[0] == 0:
                self.centroids = None  # 4.6: they start again with every epoch

        phase = training.train_phase(self, self.network, task, self.training_options, self.loss, data)
        contrast = bool(self.old) and self.options.lambda_idc > 0
        beside = (lambda: self._unlabelled(task)) if contrast else None
        return replace(phase, beside=beside, after_step=after_step, finish=self._clear)

    def _batches(self, new: Dataset) -> Batches:
        options, size = self.options, self.training_options.batch_size
        if self.replay_images is None or self.replay_labels is None:
            return first_batches(new, options, size)
        return mixed_batches(new, self.replay_images, self.replay_labels, self.class_ids, options, size)

    def _unlabelled(self, task: Task) -> Batches:
        """4.6: where the images of the contrastive loss come from; their labels are not looked at."""
        view = task.pool() if self.options.idc_source == "pool" else task.train()
        assert view is not None
        return Batches(view, self.training_options.batch_size)

    def _clear(self) -> None:
        self.counts = self.replay_images = self.replay_labels = self.centroids = None

    def loss(self, batch: Batch) -> Terms:
        """4.7: cross-entropy, less-forget distillation, margin and contrastive loss, each with its weight."""
        before = self._old_network[0] if self._old_network else None
        update = Update(self.options, self.network, before, len(self.old), self.step)
        targets = channels_of(batch.labels, self.class_ids)
        weights = self._class_weights() if "weights" in self.options.balance else None
        unlabelled = None if batch.beside is None else batch.beside.images
        found, self.centroids = update(batch.images, targets, weights, unlabelled, self.centroids)
        return found

    def _class_weights(self) -> Tensor:
        """Weights of 4.2 over all images that are there, new ones and those that stand for old classes."""
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
        return [*self.memory.kept(), *extra]
