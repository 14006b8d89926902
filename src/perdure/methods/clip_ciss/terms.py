"""The loss terms that the labels give, and query distillation (specification 3.1 to 3.3).

Class and query are the same thing: column c of every tensor is class c. Nothing is matched, nothing competes with a
background class.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.methods.clip_ciss.regions import Regions
from perdure.methods.losses import enlarge, resizer

ALPHA = 0.25
"""Focal weight of pixels in the mask; of the others 1 - ALPHA."""


def presence_loss(logits: Tensor, shown: Tensor, counted: Tensor | None = None) -> Tensor:
    """CACP (3.1): cross-entropy of {present, absent}, mean over images and classes.

    Args:
        logits: ``(B, K, 2)`` of the classes that learn; index 0 is "present".
        shown: ``(B, K)`` bool: whether the image shows the class.
        counted: ``(B, K)`` bool: where the labels tell that; everywhere if not given.

    Returns:
        Scalar float32; 0 if nothing counts.
    """
    target = (~shown).long()
    loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none")
    if counted is None:
        return loss.mean() if loss.numel() else loss.sum()
    return (loss * counted.flatten()).sum() / counted.sum().clamp_min(1)


def mask_losses(maps: Sequence[Tensor], regions: Regions, number: Tensor) -> tuple[Tensor, Tensor]:
    """Focal and dice loss (3.2), each summed over the given maps.

    The logits of the regions are gathered before they are upsampled, which gives the same numbers as the other way
    round: in 150 classes and four of them in an image it is a fortieth of the work.

    Args:
        maps: Mask logits ``(B, C, *s)`` of each stage.
        regions: P labelled masks at full size.
        number: Of masks that the sums are divided by, see :func:`masks_per_process`.

    Returns:
        Focal and dice loss, float32; both 0 without regions.
    """
    wanted = regions.masks.flatten(1).float()
    total = maps[0].new_zeros(2, dtype=torch.float32)
    if not len(wanted):
        return total[0], total[1]
    with torch.autocast(wanted.device.type, enabled=False):
        for logits in maps:
            few = logits[regions.images, regions.columns].float().unsqueeze(1)
            sizes = zip(few.shape[2:], regions.masks.shape[1:], strict=True)
            full = enlarge(few, [resizer(small, size, few) for small, size in sizes]).flatten(1)
            total = total + torch.stack([focal(full, wanted, number), dice(full, wanted, number)])
    return total[0], total[1]


def focal(logits: Tensor, targets: Tensor, number: Tensor | float) -> Tensor:
    """Sum over masks of the mean over pixels of ``α_t (1 - p_t)² BCE``, divided by ``number``.

    Args:
        logits: ``(P, S)``.
        targets: ``(P, S)``, 0 or 1.
        number: n̄.
    """
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    missed = torch.where(targets > 0, (-logits).sigmoid(), logits.sigmoid())  # 1 - p_t
    weight = torch.where(targets > 0, ALPHA, 1 - ALPHA)
    return (weight * missed.square() * loss).mean(1).sum() / number


def dice(logits: Tensor, targets: Tensor, number: Tensor | float) -> Tensor:
    """Sum over masks of ``1 - (2 Σ σ g + 1) / (Σ σ + Σ g + 1)``, divided by ``number``.

    Arguments as in :func:`focal`.
    """
    inside = logits.sigmoid()
    overlap = 2 * (inside * targets).sum(1) + 1
    return (1 - overlap / (inside.sum(1) + targets.sum(1) + 1)).sum() / number


def masks_per_process(regions: Regions) -> Tensor:
    """n̄ ``()``: masks of the batch over all processes, divided by the number of processes; at least 1."""
    number = torch.tensor(float(len(regions.masks)), device=regions.masks.device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(number)
        number = number / torch.distributed.get_world_size()
    return number.clamp_min(1)


def query_distillation(queries: Tensor, old_queries: Tensor) -> Tensor:
    """QD (3.3): squared distance of decoded queries, summed over their length, mean over stages, images and classes.

    Args:
        queries: ``(S, B, C, D)``; the first columns are the old classes.
        old_queries: ``(S, B, C_old, D)`` of the previous model; no gradient flows there.

    Returns:
        Scalar float32; 0 without old classes.
    """
    old = old_queries.shape[2]
    if not old:
        return queries.float().sum() * 0.0
    apart = queries[:, :, :old].float() - old_queries.detach().float()
    return apart.square().sum(-1).mean()
