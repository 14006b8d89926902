"""What simple methods share: how the network grows, data, optimiser, phase, loss and scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from perdure.data.dataset import Batch
from perdure.data.source import Kind
from perdure.engine.phases import Batches, Terms, Train
from perdure.engine.schedules import by_name
from perdure.labels import BACKGROUND
from perdure.methods.losses import channels_of, class_bce
from perdure.methods.method import Prediction
from perdure.methods.options import TrainingOptions
from perdure.networks.network import GrowingNetwork, Network
from perdure.streams.task import Task


def grow(network: GrowingNetwork, task: Task, training: TrainingOptions) -> None:
    """Append the task's classifier and, after the first task, freeze normalisation if the training says so."""
    network.grow(len(task.new))
    if task.index > 0 and training.freeze_norm:
        network.freeze_norm()


def batches(task: Task, training: TrainingOptions) -> Batches:
    """Training data of a task, shuffled, without a last smaller batch (a set below one batch is one batch)."""
    return Batches(task.train(), size=training.batch_size, shuffle=True, drop_last=True)


def base_lr(training: TrainingOptions, later: bool) -> float:
    """Learning rate of the backbone at the first or at a later task."""
    if not later:
        return training.lr
    return training.lr / 10 if training.later_lr is None else training.later_lr


def make_optimizer(network: Network, training: TrainingOptions, later: bool) -> Optimizer:
    """Optimiser with one learning rate per part of the network (STAR, spec 5.1).

    The neck learns ``neck_lr`` times faster than the backbone, classifiers ``classifier_lr`` times, and at later
    tasks the newest classifier ``new_classifier_lr`` times. Other parts, such as the scale of cosine logits, learn as
    fast as the backbone. Frozen parameters are in no group.
    """
    lr = base_lr(training, later)
    factors = {
        "neck": training.neck_lr,
        "old_classifiers": training.classifier_lr,
        "new_classifier": training.new_classifier_lr if later else training.classifier_lr,
    }
    parts = network.parameter_groups()
    groups = [{"params": params, "lr": lr * factors.get(part, 1.0)} for part, params in parts.items() if params]
    if training.optimizer == "adamw":
        return AdamW(groups, lr=lr, weight_decay=training.weight_decay)
    momentum = training.momentum
    return SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, weight_decay=training.weight_decay)


def train_phase(
    module: nn.Module,
    network: Network,
    task: Task,
    training: TrainingOptions,
    loss: Callable[[Batch], Terms],
    data: Callable[[], Batches] | None = None,
) -> Train:
    """Phase ``train`` of a task with the recipe's length, schedule, groups and clipping; on ``data`` if given."""
    later = task.index > 0
    return Train(
        name="train",
        module=module,
        loss=loss,
        optimizer=lambda: make_optimizer(network, training, later),
        data=data or (lambda: batches(task, training)),
        schedule=by_name(training.schedule, training.warmup, training.stairs),
        epochs=(training.later_epochs or training.epochs) if later else training.epochs,
        clip=training.clip,
        ema=training.ema,
        accumulate=training.accumulate,
    )


def current_loss(
    network: GrowingNetwork,
    batch: Batch,
    class_ids: Sequence[int],
    training: TrainingOptions,
    ignore_as_negative: bool = True,
    first: int = 0,
) -> Tensor:
    """What a method without protection minimises: how badly the network tells ``class_ids`` apart in a batch.

    Segmentation: sum over classes of binary cross-entropy, mean over pixels (STAR, spec 4.1). Classification:
    cross-entropy of the softmax over the classes, mean over images.

    Args:
        network: Network of either kind of label.
        batch: Images and labels.
        class_ids: Ids of the channels of ``classify(first=first)``.
        training: Gives the weight of positive pixels.
        ignore_as_negative: Segmentation: ignored pixels count as negatives.
        first: First classifier that takes part.
    """
    logits = network.classify(network.features(batch.images), first=first)
    return OBJECTIVES[network.kind].loss(logits, batch.labels, class_ids, training.pos_weight, ignore_as_negative)


def scores(network: GrowingNetwork, images: Tensor, class_ids: Sequence[int]) -> Prediction:
    """Sigmoid scores beside background in segmentation, the softmax in classification."""
    return OBJECTIVES[network.kind].scores(network, images, class_ids)


@torch.no_grad()
def softmax_scores(network: GrowingNetwork, images: Tensor, class_ids: Sequence[int]) -> Prediction:
    """Probability ``(N, K)`` of each class for whole images."""
    return Prediction(network.full_logits(images).softmax(1), tuple(class_ids))


@torch.no_grad()
def sigmoid_scores(network: GrowingNetwork, images: Tensor, class_ids: Sequence[int]) -> Prediction:
    """Probability of each class at the images' size, beside a constant 0.5 for background (STAR, spec 1.7).

    A class wins where it is the likeliest and above 0.5. The mode of the network is the caller's business.
    """
    logits = network.full_logits(images)
    scores = torch.cat([torch.full_like(logits[:, :1], 0.5), logits.sigmoid()], 1)
    return Prediction(scores, (BACKGROUND, *class_ids))


def _pixel_loss(
    logits: Tensor, labels: Tensor, class_ids: Sequence[int], pos_weight: float, ignore_as_negative: bool
) -> Tensor:
    return class_bce(logits, labels, class_ids, pos_weight, ignore_as_negative).sum()


def _image_loss(logits: Tensor, labels: Tensor, class_ids: Sequence[int], *_unused: object) -> Tensor:
    """Without weight and ignored positions: every image has exactly one class."""
    return F.cross_entropy(logits.float(), channels_of(labels, class_ids))


class Objective(NamedTuple):
    """What depends on the kind of label in methods for both kinds: the one place that knows.

    Args:
        loss: Logits, labels, class ids, weight of positives, whether ignored pixels count as negatives -> loss.
        scores: Network, images, class ids -> prediction.
    """

    loss: Callable[[Tensor, Tensor, Sequence[int], float, bool], Tensor]
    scores: Callable[[GrowingNetwork, Tensor, Sequence[int]], Prediction]


OBJECTIVES: Final[Mapping[Kind, Objective]] = {
    "segmentation": Objective(_pixel_loss, sigmoid_scores),
    "classification": Objective(_image_loss, softmax_scores),
}
