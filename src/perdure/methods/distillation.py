"""Distances between a network's outputs and those of the frozen network from before the task, for any method."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def softmax_distillation(logits: Tensor, old_logits: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of softened class probabilities, mean over images, times T² (Li and Hoiem, eq. 2 and 3).

    Args:
        logits: ``(N, K)``.
        old_logits: ``(N, K)`` of the old network.
        temperature: T. The square keeps the size of the gradients (Hinton et al. 2015).

    Returns:
        Scalar float32; 0 where K is below 2, for then there is nothing to tell apart.
    """
    if logits.shape[1] < 2:
        return logits.float().sum() * 0.0
    wanted = (old_logits.float() / temperature).softmax(1)
    return temperature**2 * F.cross_entropy(logits.float() / temperature, wanted)


def sigmoid_distillation(logits: Tensor, old_logits: Tensor, unlabelled: Tensor, open_: Tensor) -> Tensor:
    """Binary cross-entropy of each class with its old probability, mean over positions, sum over classes.

    Args:
        logits: ``(N, K, *s)``.
        old_logits: ``(N, K, *s)`` of the old network.
        unlabelled: ``(N, *s)`` bool. Elsewhere the label names another class, so that the target is 0 whatever the old
            network says.
        open_: ``(N, K)`` bool: images whose labels do not say where a class is; others do not count.

    Returns:
        Scalar float32; 0 if nothing counts.
    """
    wanted = old_logits.float().sigmoid() * unlabelled.unsqueeze(1)
    loss = F.binary_cross_entropy_with_logits(logits.float(), wanted, reduction="none").flatten(2).mean(2)
    return ((loss * open_).sum(0) / open_.sum(0).clamp_min(1)).sum()


def unbiased_distillation(
    logits: Tensor, old_logits: Tensor, unlabelled: Tensor, open_: Tensor, temperature: float
) -> Tensor:
    """Cross-entropy with the old network's probabilities of open classes and of everything else, times T² (MiB).

    Everything else is background and, for the old network, classes that the labels tell; for the new one also its new
    classes.

    Args:
        logits: ``(N, 1 + K, *s)``, background first.
        old_logits: ``(N, 1 + K_old, *s)`` of the old network, background first.
        unlabelled: ``(N, *s)`` bool: positions that count, those that are labelled as no class.
        open_: ``(N, K_old)`` bool: images whose labels do not say where an old class is.
        temperature: T.

    Returns:
        Scalar float32, mean over the positions; 0 if there are none.
    """
    old = open_.shape[1]
    student = (logits.float() / temperature).log_softmax(1)
    teacher = (old_logits.float() / temperature).log_softmax(1)
    alone = open_.view(*open_.shape, *[1] * (logits.dim() - 2))
    rest_is = teacher[:, 1:].masked_fill(alone, -torch.inf)
    rest_wanted = torch.cat([teacher[:, :1], rest_is], 1).logsumexp(1).exp()
    more = [student[:, :1], student[:, 1 : 1 + old].masked_fill(alone, -torch.inf), student[:, 1 + old :]]
    by_class = (teacher[:, 1:].exp() * student[:, 1 : 1 + old] * alone).sum(1)
    loss = -(rest_wanted * torch.cat(more, 1).logsumexp(1) + by_class)
    return temperature**2 * (loss * unlabelled).sum() / unlabelled.sum().clamp_min(1)
