"""Binary cross-entropy with one sigmoid a class, shared by every method that has no background channel.

All functions take any number of spatial axes ``*S`` and labels in global ids; the channel of a class comes from
an explicit list of ids, never from the value of its label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from perdure.errors import PerdureError
from perdure.labels import BACKGROUND, IGNORE, ChannelMap

PIECE_ON_CPU: Final = 1 << 20
"""Full-size logits that :func:`class_bce` handles at a time (at least one image): what fits a cache."""
PIECE_ON_GPU: Final = 1 << 26
"""The same on a GPU: enough to keep it busy."""


def channels_of(labels: Tensor, class_ids: Sequence[int]) -> Tensor:
    """Channel of every label: position in ``class_ids``, or -1 for labels that are not among them.

    Args:
        labels: Global ids, any shape, int64.
        class_ids: Id of each channel; 0 may be one of them.
    """
    table = torch.as_tensor(ChannelMap(tuple(class_ids)).to_channel(), device=labels.device)
    return table.gather(0, labels.flatten()).view(labels.shape)  # several times faster than table[labels] on a CPU


def class_bce(
    logits: Tensor,
    labels: Tensor,
    class_ids: Sequence[int],
    pos_weight: float = 1.0,
    ignore_as_negative: bool = True,
    annotated: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy of each class on linearly upsampled logits, mean over pixels (STAR, spec 4.1).

    ``-[w y log s(z) + (1 - y) log(1 - s(z))]`` with ``y = [label = class]``. Computed in float32, a few images at
    a time and without a one-hot target, so that full-size logits of a whole batch never exist.

    Args:
        logits: ``(N, C, *s)``, of the labels' size or smaller (upsampled with corners not aligned).
        labels: ``(N, *S)`` int64 global ids.
        class_ids: Global id of each of the C channels.
        pos_weight: Weight w of positive pixels.
        ignore_as_negative: Ignored pixels count as negatives of every class, as published; otherwise they are
            left out of the mean.
        annotated: ``(N, TABLE_SIZE)`` bool, which classes each image labels, or ``None`` for all. Where an image does
            not label a class, its background and its ignored pixels may be that class: they are left out of the
            class's mean. Pixels of another class stay negatives, for they are known not to be it.

    Returns:
        ``(C,)`` float32; sum it for the loss. 0 for a class of which every pixel is left out.

    Raises:
        PerdureError: The shapes do not fit together.
    """
    if logits.shape[0] != labels.shape[0] or logits.dim() != labels.dim() + 1 or logits.shape[1] != len(class_ids):
        raise PerdureError(
            f"logits {tuple(logits.shape)} do not fit labels {tuple(labels.shape)} and {len(class_ids)} classes",
            "logits need one channel a class, and as many images and axes as the labels",
        )
    valid = None if ignore_as_negative else (labels != IGNORE).unsqueeze(1)
    if annotated is not None:
        unlabelled = ((labels == BACKGROUND) | (labels == IGNORE)).unsqueeze(1)
        certain = ~unlabelled | annotates(annotated, class_ids, labels.dim() - 1)
        valid = certain if valid is None else valid & certain
    loss: Tensor = _ClassBce.apply(logits.float(), channels_of(labels, class_ids), valid, pos_weight)
    return loss


def annotates(annotated: Tensor, class_ids: Sequence[int], axes: int) -> Tensor:
    """Whether each image labels each class, ``(N, C, 1, ...)`` bool with ``axes`` spatial axes of length one."""
    known = annotated[:, list(class_ids)]
    return known.view(*known.shape, *[1] * axes)


def negative_bce(logits: Tensor, where: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of each class against all-zero targets, mean over positions (spec 4.2).

    Args:
        logits: ``(N, C, *s)``.
        where: ``(N, *s)`` or, where it differs between classes, ``(N, C, *s)`` bool: positions that count; all of
            them if not given.

    Returns:
        ``(C,)`` float32; zeros if no position counts.
    """
    loss = F.softplus(logits.float()).transpose(0, 1).flatten(1)
    if where is None:
        return loss.mean(1)
    weights = (where if where.dim() == logits.dim() else where.unsqueeze(1)).transpose(0, 1).flatten(1).to(loss.dtype)
    # not `loss @ weights`: under autocast a product is taken in half precision, where a sum over a batch overflows
    return (loss * weights).sum(1) / weights.sum(1).clamp_min(1.0)


class _ClassBce(torch.autograd.Function):
    """Mean over pixels of weighted BCE by class, with its derivative worked out on the way forward.

    A class's loss depends on its own channel only, so its derivative can be taken before the gradient of the
    loss is known; each piece of full-size logits is used up at once. Only one channel a pixel can be positive:
    the all-negative loss is computed and overwritten there.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, channels: Tensor, valid: Tensor | None, pos_weight: float) -> Tensor:
        size = channels.shape[1:]
        resizers = [resizer(small, full, logits) for small, full in zip(logits.shape[2:], size, strict=True)]
        total = logits.new_zeros(logits.shape[1])
        slopes = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        budget = PIECE_ON_CPU if logits.device.type == "cpu" else PIECE_ON_GPU
        images = max(1, budget // max(1, logits.shape[1] * channels[0].numel()))
        with torch.autocast(logits.device.type, enabled=False):
            for first in range(0, len(logits), images):
                here = slice(first, first + images)
                full = enlarge(logits[here], resizers)
                loss, slope = _pixel_bce(full, channels[here], pos_weight, slopes is not None)
                if valid is not None:
                    loss = loss * valid[here]
                total += loss.flatten(2).sum((0, 2))
                if slopes is not None and slope is not None:
                    slopes[here] = shrink(slope if valid is None else slope * valid[here], resizers)
        count = torch.tensor(float(channels.numel()))
        if valid is not None:  # (N, 1, *S), or (N, C, *S) where each class has pixels of its own
            count = valid.transpose(0, 1).flatten(1).sum(1).clamp_min(1)
        share = count.to(total).reciprocal()
        if slopes is not None:
            slopes = slopes.mul_(share.view(1, -1, *[1] * len(size)))
        ctx.save_for_backward(slopes)
        return total.mul_(share)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return grad.view(1, -1, *[1] * (slopes.dim() - 2)) * slopes, None, None, None


def _pixel_bce(logits: Tensor, channels: Tensor, pos_weight: float, slope: bool) -> tuple[Tensor, Tensor | None]:
    """Loss of each logit and, if wanted, its derivative; both ``(n, C, *S)``."""
    index, positive = channels.clamp_min(0).unsqueeze(1), (channels >= 0).unsqueeze(1)
    at_label = logits.gather(1, index)
    loss = F.softplus(logits)
    as_negative = loss.gather(1, index)
    # log(1 + exp(-z)) = log(1 + exp(z)) - z
    loss.scatter_(1, index, torch.where(positive, (as_negative - at_label).mul_(pos_weight), as_negative))
    if not slope:
        return loss, None
    slopes, here = logits.sigmoid(), at_label.sigmoid()
    slopes.scatter_(1, index, torch.where(positive, (here - 1.0).mul_(pos_weight), here))
    return loss, slopes


def resizer(small: int, full: int, like: Tensor) -> Tensor | None:
    """Matrix ``(full, small)`` of linear interpolation along one axis; ``None`` where nothing changes.

    Products with it, axis by axis, are several times faster than the general resize on a CPU, above all backward.
    """
    if small == full:
        return None
    unit = torch.eye(small, dtype=like.dtype, device=like.device)[None]
    return F.interpolate(unit, full, mode="linear", align_corners=False)[0].t().contiguous()


def enlarge(maps: Tensor, resizers: Sequence[Tensor | None]) -> Tensor:
    """Multiply each spatial axis of ``(n, C, *s)`` by its matrix."""
    for axis, matrix in enumerate(resizers, 2):
        maps = maps if matrix is None else _along(maps, axis, matrix)
    return maps


def shrink(maps: Tensor, resizers: Sequence[Tensor | None]) -> Tensor:
    """Transpose of :func:`enlarge`."""
    for axis, matrix in reversed(list(enumerate(resizers, 2))):
        maps = maps if matrix is None else _along(maps, axis, matrix.t())
    return maps


def _along(maps: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """Apply ``matrix (out, in)`` along one axis."""
    before, after = maps.shape[:axis], maps.shape[axis + 1 :]
    if not after:
        return maps @ matrix.t()
    return (matrix @ maps.reshape(*before, maps.shape[axis], -1)).reshape(*before, len(matrix), *after)
