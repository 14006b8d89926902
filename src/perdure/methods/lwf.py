"""Learning without Forgetting: agree with the network as it was before the task about the classes it knew.

Li and Hoiem: "Learning without Forgetting", ECCV 2016. A frozen copy of the network from before the task looks at the
new images; what it says about earlier classes is the target where the labels of the new images say nothing about them.
Nothing is kept but the weights.

Segmentation has two forms:

* ``sigmoid``: one binary problem per class, as the network's classifiers are trained by other methods here. The old
  probability of an old class is the target of its binary cross-entropy.
* ``softmax``: background has the fixed logit 0 and competes with all classes. What was background to the old network
  may be a new class now, so its background is compared with the sum of background and new classes, and pixels
  labelled background count for background or any class that their image does not annotate: the unbiased distillation
  and cross-entropy of Cermelli et al., "Modeling the Background for Incremental Learning in Semantic Segmentation"
  (MiB), CVPR 2020; with partial labels the cross-entropy is the marginal loss of Shi et al., MedIA 2021.

An image that annotates an old class teaches it by its labels; the old network is not asked about that class. The
exception is a task that teaches nothing new, such as the same structures from another scanner: there it is asked about
all classes at all positions beside the labels, as Li and Hoiem's loss is used where the domain alone changes (van de
Ven et al., "Three types of incremental learning", Nature Machine Intelligence 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from perdure.data.case import Batch
from perdure.engine.phases import Phase, Terms
from perdure.kept.items import Kept
from perdure.labels import BACKGROUND, IGNORE
from perdure.methods import training
from perdure.methods.distillation import sigmoid_distillation, softmax_distillation, unbiased_distillation
from perdure.methods.losses import channels_of, class_bce
from perdure.methods.method import Method
from perdure.methods.options import Setup
from perdure.methods.past import told
from perdure.methods.prediction import Prediction
from perdure.methods.replay import ReplayOptions, make_past, training_phases
from perdure.networks.frozen import Frozen
from perdure.networks.network import GrowingNetwork
from perdure.networks.segmenter import upsample
from perdure.streams.task import Task


class LwfOptions(ReplayOptions):
    """Settings of the method."""

    form: Literal["sigmoid", "softmax"] = Field(
        "sigmoid",
        description="segmentation: one binary problem per class, or all classes and background in one softmax; whole "
        "images always have one softmax",
    )
    distill: float = Field(1.0, ge=0, description="weight of agreeing with the old network about old classes")
    temperature: float = Field(2.0, gt=0, description="softmax: both networks' logits are divided by it")
    ignore_as_negative: bool = Field(
        True, description="form sigmoid: count ignored pixels as negatives, as STAR does; softmax leaves them out"
    )


class Lwf(Method[LwfOptions]):
    """The plain loss of the classes that the task annotates, distillation of the others.

    Attributes:
        old: Classes of earlier tasks.
        learning: Classes seen so far that the task or a replayed one annotates, old ones that come back included.
        present: Those that the task annotates.
        known: The task teaches no new class.
    """

    Options = LwfOptions
    kinds = frozenset({"segmentation", "classification"})

    def __init__(self, setup: Setup[LwfOptions]) -> None:
        super().__init__(setup)
        self.network = setup.network(GrowingNetwork)
        self.past = make_past(self.options, self.network, self.training_options.batch_size)
        self.averages_images = self.options.replay == "impressions"
        self.most_classes = self.options.most_classes
        self.old: tuple[int, ...] = ()
        self.learning: tuple[int, ...] = ()
        self.present: tuple[int, ...] = ()
        self.known = False
        self.old_network: Frozen[GrowingNetwork[Tensor]] | None = None

    def begin(self, task: Task) -> None:
        """Freeze a copy of the network, then append a classifier for the task's new classes, if it has any."""
        self.old, self.class_ids = task.old, task.seen
        self.past.begin(task)
        labelled = task.annotated.union(*self.past.taught)
        self.learning = tuple(c for c in task.seen if c in labelled)
        self.present = tuple(c for c in task.seen if c in task.annotated)
        self.known = not task.new
        self.old_network = Frozen(self.network) if task.index > 0 else None
        training.grow(self.network, task, self.training_options)

    def phases(self, task: Task) -> Sequence[Phase]:
        """One training phase, and those of the replayed past around it."""
        return training_phases(self, self.past, self.network, task, self.loss)

    @property
    def replayed(self) -> int:
        """Samples of earlier tasks that the present task trained on."""
        return self.past.replayed(self)

    def kept(self) -> Sequence[Kept]:
        """What the replayed past keeps."""
        return self.past.kept("past.")

    def loss(self, batch: Batch) -> Terms:
        """The loss of the labels, and at later tasks the distance from the old network."""
        batch = told(batch, self.past)
        logits = self.network.classify(self.network.features(batch.images))
        old_logits = None
        if self.old_network is not None:
            old = self.old_network.module
            with torch.no_grad():
                old_logits = old.classify(old.features(batch.images))
        whole = self.network.kind == "classification"
        form = self._whole_images if whole else {"sigmoid": self._sigmoid, "softmax": self._softmax}[self.options.form]
        current, distill = form(logits, old_logits, batch)
        if distill is None:
            return {"current": current}
        return {"current": current, "distill": self.options.distill * distill}

    def _whole_images(self, logits: Tensor, old_logits: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Cross-entropy of all classes, and softened cross-entropy with the old network of those without new labels.

        Published for tasks that are known in prediction, with a softmax per task. Here no task is known: softmaxes of
        their own would leave the logits of different tasks without a common scale.
        """
        current = F.cross_entropy(logits.float(), channels_of(batch.labels, self.class_ids))
        if old_logits is None:
            return current, None
        rest = [i for i, c in enumerate(self.old) if self.known or c not in self.present]
        return current, softmax_distillation(logits[:, rest], old_logits[:, rest], self.options.temperature)

    def _sigmoid(self, logits: Tensor, old_logits: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Binary cross-entropy per class: with the labels, and with the old network's probabilities."""
        channels, weight = [self.class_ids.index(c) for c in self.learning], self.training_options.pos_weight
        keep, mine = self.options.ignore_as_negative, logits[:, channels]
        current = class_bce(mine, batch.labels, self.learning, weight, keep, batch.annotated).sum()
        if old_logits is None:
            return current, None
        # cells of the classifiers' grid: distilling needs no full-size logits
        labels = F.interpolate(batch.labels[:, None].float(), logits.shape[2:], mode="nearest-exact")[:, 0]
        asked = self._unlabelled(labels), self._open(batch)
        return current, sigmoid_distillation(logits[:, : len(self.old)], old_logits, *asked)

    def _softmax(self, logits: Tensor, old_logits: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Unbiased cross-entropy with the labels, and unbiased distillation."""
        told = self._told(batch, self.class_ids)
        full = _with_background(upsample(logits.float(), batch.labels.shape[1:]))
        current = marginal_cross_entropy(full, batch.labels, self.class_ids, told, self.training_options.pos_weight)
        if old_logits is None:
            return current, None
        labels = F.interpolate(batch.labels[:, None].float(), logits.shape[2:], mode="nearest-exact")[:, 0]
        maps = _with_background(logits), _with_background(old_logits)
        asked = self._unlabelled(labels), self._open(batch)
        return current, unbiased_distillation(*maps, *asked, self.options.temperature)

    def _told(self, batch: Batch, class_ids: Sequence[int]) -> Tensor:
        """Whether the labels of each image say where each class is, ``(N, len(class_ids))`` bool."""
        told = torch.tensor([c in self.learning for c in class_ids], device=batch.labels.device)
        told = told.expand(len(batch.labels), -1)
        return told if batch.annotated is None else told & batch.annotated[:, list(class_ids)]

    def _open(self, batch: Batch) -> Tensor:
        """Whether the old network is asked about each old class in each image, ``(N, K_old)`` bool."""
        return ~self._told(batch, self.old) | self.known

    def _unlabelled(self, labels: Tensor) -> Tensor:
        """Where the old network is asked: where labels name no class, or everywhere if all classes are known."""
        return (labels == BACKGROUND) | (labels == IGNORE) | self.known

    def predict(self, images: Tensor) -> Prediction:
        """Scores of all classes seen so far.

        Sigmoid scores beside 0.5 for background also in the form ``softmax``: with background's logit at 0 the same
        class wins, and the scores of a class do not need those of all others.
        """
        return training.scores(self.network, images, self.class_ids)


def marginal_cross_entropy(
    logits: Tensor, labels: Tensor, class_ids: Sequence[int], told: Tensor, pos_weight: float = 1.0
) -> Tensor:
    """Cross-entropy in which a background pixel may be background or any class that its image does not annotate.

    Args:
        logits: ``(N, 1 + K, *S)``, background first.
        labels: ``(N, *S)`` int64 global ids; ignored pixels do not count.
        class_ids: Global id of each of the K classes.
        told: ``(N, K)`` bool: whether the labels of an image say where a class is.
        pos_weight: Weight of pixels that are labelled as a class, as in :func:`~perdure.methods.losses.class_bce`.

    Returns:
        Scalar float32, mean over pixels; 0 if none counts.
    """
    log_p = logits.float().log_softmax(1)
    known = told.view(*told.shape, *[1] * (labels.dim() - 1))
    background = torch.cat([log_p[:, :1], log_p[:, 1:].masked_fill(known, -torch.inf)], 1).logsumexp(1)
    channels = channels_of(labels, class_ids)
    picked = log_p.gather(1, (channels + 1).clamp_min(0).unsqueeze(1))[:, 0]
    valid = labels != IGNORE
    return -(torch.where(channels < 0, background, pos_weight * picked) * valid).sum() / valid.sum().clamp_min(1)


def _with_background(logits: Tensor) -> Tensor:
    """``(N, K, *s)`` -> ``(N, 1 + K, *s)``: background's logit is 0, as where sigmoids are compared with one half."""
    return torch.cat([logits.new_zeros(len(logits), 1, *logits.shape[2:]), logits], 1)
