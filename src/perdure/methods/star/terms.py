"""The loss terms of STAR that are its own (spec 4.2 to 4.4), for any number of spatial axes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx, once_differentiable

NEAREST = 1e-6
"""Smallest distance that :func:`sad` divides by."""


class Balanced(NamedTuple):
    """The three parts of L_mbce, each summed over classes and weighted; their sum is L_mbce."""

    current: Tensor
    replay: Tensor
    background: Tensor


def replay_bce(chunks: Iterable[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """L_rep: binary cross-entropy of each new class on replayed features, all negatives, mean over features.

    The features carry no graph and each class's loss depends on its own weights only, so the derivative is
    added up chunk by chunk on the way forward: memory is that of one chunk. Always float32.

    Args:
        chunks: Features ``(k_i, D)``; may be empty.
        weight: ``(C, D)`` of the new classifier.
        bias: ``(C,)``.

    Returns:
        ``(C,)``; zeros without features.
    """
    loss: Tensor = _ReplayBce.apply(weight, bias, chunks)
    return loss


def balance(
    current: Tensor, replay: Tensor, background: Tensor, replay_weight: Tensor, background_weight: Tensor
) -> Balanced:
    """Replay-balanced combination of 4.2: ``sum (L_cur + w_rep L_rep + w_bg L_bg) / (1 + w_rep + w_bg)``.

    Args:
        current: L_cur ``(C,)``.
        replay: L_rep ``(C,)``.
        background: L_bg ``(C,)``.
        replay_weight: w_rep ``()``: replayed vectors over cells of the batch.
        background_weight: w_bg ``()``: rho times the share of true-background cells in the batch.
    """
    total = 1.0 + replay_weight + background_weight
    return Balanced(
        current.sum() / total,
        replay_weight * replay.sum() / total,
        background_weight * background.sum() / total,
    )


def ocfm(features: Tensor, old_features: Tensor, mask: Tensor) -> Tensor:
    """Old-class features maintaining (4.3): mean squared change of the features where old classes are.

    Args:
        features: ``(N, D, *s)``.
        old_features: The old network's, ``(N, D, *s)``.
        mask: ``(N, *s)`` in 0..1: how much of a cell the old network calls an old class.

    Returns:
        Scalar float32; 0 if the mask is empty.
    """
    change = (features.float() - old_features.float()).square().sum(1)
    weight = mask.to(change.dtype)
    return (weight * change).sum() / (features.shape[1] * weight.sum()).clamp_min(NEAREST)


def sad(features: Tensor, channels: Tensor, classes: int, prototypes: Tensor, absent: bool = False) -> Tensor:
    """Similarity-aware discriminative term (4.4): keep new classes' centres away from old prototypes.

    Mean over new classes of ``1 / min_c |g_k - p_c|``, where ``g_k`` is the unit mean of unit features of the
    class's cells, each cell weighted by how much of its core the class fills.

    Args:
        features: ``(N, D, *s)``.
        channels: ``(P, N, *s)`` channel of each core pixel, -1 for none (see :mod:`statistics`).
        classes: New classes.
        prototypes: ``(C_old, D)``; rows of zeros belong to classes without statistics and do not count.
        absent: Let classes that are absent from the batch contribute their constant 1, as published (Q7);
            otherwise the mean is over present classes.

    Returns:
        Scalar float32; 0 if no class is present.
    """
    core = channels.flatten(2).movedim(0, -1) + 1
    share = torch.full(core.shape, 1.0 / len(channels), device=core.device)
    fill = torch.zeros(*core.shape[:2], classes + 1, device=core.device).scatter_add_(2, core, share)[..., 1:]
    vectors = features.float().flatten(2)
    length = vectors.square().sum(1).clamp_min(NEAREST**2).sqrt()
    # Autocast would round the sum of thousands of vectors to half precision.
    with torch.autocast(features.device.type, enabled=False):
        centres = F.normalize((vectors @ (fill / length.unsqueeze(2))).sum(0).t(), dim=1, eps=NEAREST)
        distance = torch.cdist(centres, prototypes.float(), compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance.masked_fill(~prototypes.any(1), torch.inf)
    push = distance.amin(1).clamp_min(NEAREST).reciprocal()
    counts = torch.ones_like(push) if absent else (fill.amax((0, 1)) > 0).to(push.dtype)
    return (push * counts).sum() / counts.sum().clamp_min(1.0)


class _ReplayBce(torch.autograd.Function):
    """Mean softplus of a linear layer over chunks, with its derivative added up on the way forward."""

    @staticmethod
    def forward(ctx: FunctionCtx, weight: Tensor, bias: Tensor, chunks: Iterable[Tensor]) -> Tensor:
        weight_slope, bias_slope, total = torch.zeros_like(weight), torch.zeros_like(bias), torch.zeros_like(bias)
        count = 0
        with torch.autocast(weight.device.type, enabled=False):
            for features in chunks:
                logits = torch.addmm(bias, features, weight.t())
                total += F.softplus(logits).sum(0)
                slope = logits.sigmoid_()
                weight_slope.addmm_(slope.t(), features)
                bias_slope += slope.sum(0)
                count += len(features)
        share = 1.0 / max(count, 1)
        ctx.save_for_backward(weight_slope.mul_(share), bias_slope.mul_(share))
        return total.mul_(share)

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weight_slope, bias_slope = tuple(ctx.saved_tensors)  # torch types it as a single one
        return grad[:, None] * weight_slope, grad * bias_slope, None
