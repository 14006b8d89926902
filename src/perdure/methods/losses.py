"""Binary cross-entropy with one sigmoid a class, shared by every method that has no background channel.

All functions take any number of spatial axes ``*S`` and labels in global ids; the channel of a class comes from
an explicit list of ids, never from the value of its label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from perdure.errors import PerdureError
from perdure.labels import IGNORE, ChannelMap

_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def channels_of(labels: Tensor, class_ids: Sequence[int]) -> Tensor:
    """Channel of every label: position in ``class_ids``, or -1 for labels that are not among them.

    Args:
        labels: Global ids, any shape, int64, 0..255.
        class_ids: Id of each channel; 0 may be one of them.
    """
    return torch.as_tensor(ChannelMap(tuple(class_ids)).to_channel(), device=labels.device)[labels]


def upsample(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Resize ``(N, C, *s)`` to ``(N, C, *size)`` linearly along every axis, in float32, corners not aligned."""
    return F.interpolate(logits.float(), tuple(size), mode=_MODES[logits.dim() - 2], align_corners=False)


def class_bce(
    logits: Tensor,
    labels: Tensor,
    class_ids: Sequence[int],
    pos_weight: float = 1.0,
    ignore_as_negative: bool = True,
) -> Tensor:
    """Binary cross-entropy of each class, mean over pixels (STAR, spec 4.1).

    ``-[w y log s(z) + (1 - y) log(1 - s(z))]`` with ``y = [label = class]``. Computed in float32 without a
    one-hot target; one tensor of the logits' size is made forward and one backward.

    Args:
        logits: ``(N, C, *S)``.
        labels: ``(N, *S)`` int64 global ids.
        class_ids: Global id of each of the C channels.
        pos_weight: Weight w of positive pixels.
        ignore_as_negative: Ignored pixels count as negatives of every class, as published; otherwise they are
            left out of the mean.

    Returns:
        ``(C,)`` float32; sum it for the loss. 0 where every pixel is left out.

    Raises:
        PerdureError: The shapes do not fit together.
    """
    if logits.shape[0] != labels.shape[0] or logits.shape[2:] != labels.shape[1:] or logits.shape[1] != len(class_ids):
        raise PerdureError(
            f"logits {tuple(logits.shape)} do not fit labels {tuple(labels.shape)} and {len(class_ids)} classes",
            "logits need one channel a class and the size of the labels: upsample them first",
        )
    valid = None if ignore_as_negative else labels != IGNORE
    loss: Tensor = _ClassBce.apply(logits.float(), channels_of(labels, class_ids), valid, pos_weight)
    return loss


def negative_bce(logits: Tensor, where: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of each class against all-zero targets, mean over positions (spec 4.2).

    Args:
        logits: ``(N, C, *s)``.
        where: ``(N, *s)`` bool, positions that count; all of them if not given.

    Returns:
        ``(C,)`` float32; zeros if no position counts.
    """
    loss = F.softplus(logits.float()).transpose(0, 1).flatten(1)
    if where is None:
        return loss.mean(1)
    weight = where.flatten().to(loss.dtype)
    return loss @ weight / weight.sum().clamp_min(1.0)


class _ClassBce(torch.autograd.Function):
    """Mean over pixels of weighted BCE by class, with its derivative written out.

    Only one channel a pixel can be positive, so the loss of all-negative targets is computed and overwritten
    there; autograd of a gather would fill and add another tensor of the logits' size.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, channels: Tensor, valid: Tensor | None, pos_weight: float) -> Tensor:
        index = channels.clamp_min(0).unsqueeze(1)
        positive = (channels >= 0).unsqueeze(1)
        loss = F.softplus(logits)
        at_label = pos_weight * F.softplus(-logits.gather(1, index))
        loss.scatter_(1, index, torch.where(positive, at_label, loss.gather(1, index)))
        if valid is None:
            count = torch.tensor(float(channels.numel()), device=logits.device)
        else:
            loss.mul_(valid.unsqueeze(1))
            count = valid.sum().clamp_min(1).to(loss.dtype)
        ctx.save_for_backward(logits, channels, valid, count)
        ctx.pos_weight = pos_weight
        return loss.sum((0, *range(2, loss.dim()))) / count

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, channels, valid, count = ctx.saved_tensors
        index = channels.clamp_min(0).unsqueeze(1)
        slope = torch.sigmoid(logits)
        at_label = slope.gather(1, index)
        positive = (channels >= 0).unsqueeze(1)
        slope.scatter_(1, index, torch.where(positive, ctx.pos_weight * (at_label - 1.0), at_label))
        slope.mul_((grad / count).view(1, -1, *[1] * (logits.dim() - 2)))
        if valid is not None:
            slope.mul_(valid.unsqueeze(1))
        return slope, None, None, None
