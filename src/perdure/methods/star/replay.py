"""Replay: how much (table 3.2 of the specification, on counts of grid cells), and the features themselves (4.2).

One epoch of a later task should show as many cells of every old class, and as much true background, as one epoch
over all images seen so far. What that means depends on whether images come back:

========================  ==============================  =====================  =====================
quantity                  overlap                         disjoint               carried
========================  ==============================  =====================  =====================
inherited background B    N_0 (1 - 0.01 new classes)      N_0                    N_0
replays k_c per iteration max(0, (N_c - M_c) / T)         max(0, N_c / T)        max(0, N_c / T)
background factor rho     max(0, B / M_0 - 0.5)           max(0, B / M_0)        max(0, B / M_0)
N_0 carried on            0.5 M_0 + B                     M_0 + B                M_0 + B
N_c carried on            N_c                             N_c + M_c              N_c
========================  ==============================  =====================  =====================

``overlap`` and ``disjoint`` are the NeurIPS rules, ``carried`` the TPAMI rule for VOC and Cityscapes. All counts
are over all processes, so the amounts do not depend on how many there are. Replays do: :func:`whole` hands each process
its share and rounds it there, and each draws its own vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
from torch import Tensor

Rule = Literal["overlap", "disjoint", "carried"]

RECURRING_SHARE: Final = 0.5
"""Overlap: share of the current background that earlier tasks have already counted."""
NEW_CLASS_SHARE: Final = 0.01
"""Overlap: share of the inherited background that is foreground now, for each new class."""


@dataclass(frozen=True)
class Counts:
    """Cells known when a later task starts, all float64.

    Args:
        old: N_c ``(C_old,)``, inherited cells of each old class.
        background: N_0 ``()``, inherited cells of background.
        predicted: M ``(1 + C_old,)``: cells labelled background that the old network calls background (M_0) and
            each old class (M_c).
    """

    old: Tensor
    background: Tensor
    predicted: Tensor


@dataclass(frozen=True)
class Amounts:
    """What follows from the counts, all float64.

    Args:
        replays: ``(C_old,)`` replayed vectors of each old class per iteration over all processes, not rounded.
        repeat: ``()`` rho, how often each true-background cell of a batch counts in addition.
        old: ``(C_old,)`` N_c to carry on.
        background: ``()`` N_0 to carry on.
    """

    replays: Tensor
    repeat: Tensor
    old: Tensor
    background: Tensor


def overlap(counts: Counts, new_classes: int, steps: int) -> Amounts:
    """Images come back in later tasks with other labels, so part of what is seen now was counted before."""
    seen, again = counts.predicted[0], counts.predicted[1:]
    inherited = counts.background * (1.0 - NEW_CLASS_SHARE * new_classes)
    return Amounts(
        replays=((counts.old - again) / steps).clamp_min(0.0),
        repeat=_factor(inherited, seen, RECURRING_SHARE),
        old=counts.old,
        background=RECURRING_SHARE * seen + inherited,
    )


def disjoint(counts: Counts, new_classes: int, steps: int) -> Amounts:  # noqa: ARG001
    """Images never come back, so everything seen now adds to what was counted."""
    seen, more = counts.predicted[0], counts.predicted[1:]
    return Amounts(
        replays=(counts.old / steps).clamp_min(0.0),
        repeat=_factor(counts.background, seen, 0.0),
        old=counts.old + more,
        background=seen + counts.background,
    )


def carried(counts: Counts, new_classes: int, steps: int) -> Amounts:
    """The TPAMI rule: as :func:`disjoint`, but counts of old classes are carried as they were first taken."""
    return replace(disjoint(counts, new_classes, steps), old=counts.old)


def _factor(inherited: Tensor, seen: Tensor, counted: float) -> Tensor:
    """``max(0, inherited / seen - counted)``; 0 where nothing is seen, for then there is nothing to repeat."""
    factor = (inherited / seen.clamp_min(1.0) - counted).clamp_min(0.0)
    return torch.where(seen > 0, factor, torch.zeros_like(factor))


RULES: Final[dict[Rule, Callable[[Counts, int, int], Amounts]]] = {
    "overlap": overlap,
    "disjoint": disjoint,
    "carried": carried,
}


def whole(amounts: Tensor, processes: int = 1, truncate: bool = False) -> Tensor:
    """Whole numbers to replay in one iteration on one process, int64.

    Rounds up with the probability of the fraction, so that rare classes with less than one vector per iteration
    still get their number over an epoch; draws from torch's generator. ``truncate`` rounds down, as published.

    Args:
        amounts: ``(C_old,)`` numbers per iteration over all processes.
        processes: How many processes share them.
        truncate: Round down.
    """
    share = amounts.double() / processes
    return (share if truncate else share + torch.rand_like(share)).floor().long()


def draw(prototypes: Tensor, spreads: Tensor, norms: Tensor, rows: Tensor, per_channel: bool = False) -> Tensor:
    """Features ``x = (p + e * spread) s`` with ``e ~ N(0, 1)`` per channel and ``s ~ N(mean, std^2)``.

    Neither renormalised after the noise nor clamped to be positive, as published. Uses torch's generator.

    Args:
        prototypes: ``(C, D)`` unit vectors.
        spreads: ``(C, D)`` standard deviation of each channel around the prototype.
        norms: ``(C, 2)`` mean and standard deviation of the features' norms.
        rows: ``(K,)`` class row of each vector.
        per_channel: Draw ``s`` for each channel instead of each vector, as in the published code (Q3).

    Returns:
        ``(K, D)``.
    """
    count, width = len(rows), prototypes.shape[1]
    mean, std = norms[rows].unbind(1)
    noise = torch.randn(count, width, dtype=prototypes.dtype, device=prototypes.device)
    size = torch.randn(count, width if per_channel else 1, dtype=prototypes.dtype, device=prototypes.device)
    # fused and in place, so that no intermediate tensor of the size of the chunk is kept
    size = torch.addcmul(mean[:, None], size, std[:, None])
    return torch.addcmul(prototypes[rows], noise, spreads[rows]).mul_(size)


def chunks(
    prototypes: Tensor, spreads: Tensor, norms: Tensor, numbers: Tensor, size: int, per_channel: bool = False
) -> Iterator[Tensor]:
    """Draw ``numbers[c]`` features of each class ``c``, at most ``size`` at a time: ``(<= size, D)`` each.

    Args:
        prototypes: See :func:`draw`; so are ``spreads``, ``norms`` and ``per_channel``.
        spreads: ``(C, D)``.
        norms: ``(C, 2)``.
        numbers: ``(C,)`` int64.
        size: Vectors per chunk.
        per_channel: See :func:`draw`.
    """
    rows = torch.repeat_interleave(numbers)
    for part in torch.split(rows, size):
        if len(part):
            yield draw(prototypes, spreads, norms, part, per_channel)
