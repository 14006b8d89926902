"""What simple methods share: how the network grows, data, optimiser, phase, loss and scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from perdure.data.case import Batch
from perdure.data.sampling import Batches, Mix
from perdure.engine.phases import Terms, Train
from perdure.engine.schedules import by_name
from perdure.labels import BACKGROUND
from perdure.methods.losses import channels_of, class_bce
from perdure.methods.options import TrainingOptions
from perdure.methods.prediction import Prediction
from perdure.networks.network import FeaturesT, GrowingNetwork, Network
from perdure.streams.task import Task


def grow(network: GrowingNetwork[FeaturesT], task: Task, training: TrainingOptions) -> None:
    """Append the task's classifier and, after the first task, freeze what the training says: norms, dropout.

    A task without new classes (the same classes from another source) gets no classifier, so there may be fewer
    classifiers than tasks.
    """
    if task.new:
        network.grow(len(task.new))
    if task.index == 0:
        return
    if training.freeze_norm:
        network.freeze_norm()
    if training.freeze_dropout:
        network.freeze_dropout()


def batches(task: Task, training: TrainingOptions) -> Batches:
    """Training data of a task, shuffled, without a last smaller batch (a set below one batch is one batch)."""
    return Batches(task.train(), size=training.batch_size, shuffle=True, drop_last=True)


def base_lr(training: TrainingOptions, later: bool) -> float:
    """Learning rate of the backbone at the first or at a later task."""
    if not later:
        return training.lr
    return training.lr / 10 if training.later_lr is None else training.later_lr


def make_optimizer(network: Network, training: TrainingOptions, later: bool, grown: bool = True) -> Optimizer:
    """Optimiser with one learning rate per part of the network (STAR, spec 5.1).

    The neck, or a decoder, learns ``neck_lr`` times faster than the backbone, classifiers ``classifier_lr`` times, and
    at later tasks the newest classifier ``new_classifier_lr`` times; the scale of cosine logits ``scale_lr`` times.
    Other parts learn as fast as the backbone. A part called ``…_norm`` learns as fast as the part that it belongs to,
    without weight decay. Frozen parameters are in no group. Where the task has not ``grown`` the network, the last
    classifier is no newer than the others.
    """
    lr = base_lr(training, later)
    factors = {
        "neck": training.neck_lr,
        "decoder": training.neck_lr,
        "old_classifiers": training.classifier_lr,
        "new_classifier": training.new_classifier_lr if later and grown else training.classifier_lr,
        "scale": training.scale_lr,
    }
    parts = network.parameter_groups()
    groups = [
        {
            "params": params,
            "lr": lr * factors.get(part.removesuffix("_norm"), 1.0),
            "weight_decay": 0.0 if part.endswith("_norm") else training.weight_decay,
        }
        for part, params in parts.items()
        if params
    ]
    if training.optimizer != "sgd":
        return (AdamW if training.optimizer == "adamw" else Adam)(groups, lr=lr)
    return SGD(groups, lr=lr, momentum=training.momentum, nesterov=training.momentum > 0)


def train_phase(
    module: nn.Module,
    network: Network,
    task: Task,
    training: TrainingOptions,
    loss: Callable[[Batch], Terms],
    data: Callable[[], Batches | Mix] | None = None,
    fresh: bool = False,
) -> Train:
    """Phase ``train`` of a task with the recipe's length, schedule, groups and clipping; on ``data`` if given.

    A network that starts from ``fresh`` weights trains as in a first task.
    """
    later = task.index > 0 and not fresh
    epochs = (training.later_epochs or training.epochs) if later else training.epochs
    steps = (training.later_steps or training.steps) if later else training.steps
    return Train(
        name="train",
        module=module,
        loss=loss,
        optimizer=lambda: make_optimizer(network, training, later, bool(task.new)),
        data=data or (lambda: batches(task, training)),
        schedule=by_name(training.schedule, training.warmup_steps or training.warmup, training.stairs),
        epochs=None if steps else epochs,
        steps=steps,
        clip=training.clip,
        ema=training.ema,
        accumulate=training.accumulate,
    )


def current_loss(
    network: GrowingNetwork[FeaturesT],
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
    if network.kind == "classification":  # every image has exactly one class: nothing is ignored or unlabelled
        return F.cross_entropy(logits.float(), channels_of(batch.labels, class_ids))
    weight = training.pos_weight
    return class_bce(logits, batch.labels, class_ids, weight, ignore_as_negative, batch.annotated).sum()


def scores(network: GrowingNetwork[FeaturesT], images: Tensor, class_ids: Sequence[int]) -> Prediction:
    """Sigmoid scores beside background in segmentation, the softmax in classification."""
    return {"segmentation": sigmoid_scores, "classification": softmax_scores}[network.kind](network, images, class_ids)


@torch.no_grad()
def softmax_scores(network: GrowingNetwork[FeaturesT], images: Tensor, class_ids: Sequence[int]) -> Prediction:
    """Probability ``(N, K)`` of each class for whole images."""
    return Prediction.dense(network.full_logits(images).softmax(1), class_ids)


@torch.no_grad()
def sigmoid_scores(network: GrowingNetwork[FeaturesT], images: Tensor, class_ids: Sequence[int]) -> Prediction:
    """Probability of each class at the images' size, beside a constant 0.5 for background (STAR, spec 1.7).

    A class wins where it is the likeliest and above 0.5. Features are computed now, the scores of a class when they
    are asked for. The mode of the network is the caller's business.
    """
    encoded = network.encode(images)

    def score(wanted: Sequence[int]) -> Tensor:
        whole = list(wanted) == list(range(len(class_ids)))
        return network.score(encoded, None if whole else wanted).sigmoid()

    return beside_background(class_ids, score, 0.5, encoded.nbytes)


def beside_background(
    class_ids: Sequence[int], score: Callable[[Sequence[int]], Tensor], background: float, held_bytes: int
) -> Prediction:
    """Scores of classes beside one constant number for background: a class wins where it is the likeliest and above it.

    Args:
        class_ids: Global ids of the classes.
        score: Positions of classes -> their scores ``(N, k, *S)``; of none ``(N, 0, *S)``.
        background: The score of background.
        held_bytes: Memory that what ``score`` needs takes.
    """

    def both(channels: Sequence[int]) -> Tensor:
        with torch.no_grad():
            wanted = [channel - 1 for channel in channels if channel]
            scores = score(wanted)
            if len(wanted) == len(channels):
                return scores
            place = list(channels).index(0)
            constant = scores.new_full((len(scores), 1, *scores.shape[2:]), background)
            return torch.cat([scores[:, :place], constant, scores[:, place:]], 1)

    return Prediction((BACKGROUND, *class_ids), both, held_bytes=held_bytes)
