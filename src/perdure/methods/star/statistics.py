"""What is stored of a class, as sums over batches (spec 3.1) and what the sums become.

Sums are float64 or int64 and add over batches and processes, so the results do not depend on either. ``codes``
are rows of new classes on the feature grid, -1 where a cell does not count.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def tally(codes: Tensor, size: int) -> Tensor:
    """Number of cells of each code 0..size-1, ``(size,)`` int64; -1 is not counted."""
    return torch.bincount(codes.flatten() + 1, minlength=size + 1)[1:]


def pseudo_labels(logits: Tensor, threshold: float) -> Tensor:
    """Labels q of 3.2: 1 + the strongest old channel where its raw logit exceeds the threshold, else 0.

    Args:
        logits: ``(..., C, *s)`` with the channel axis at position 2: ``(P, N, C, *s)``.
        threshold: On the raw logit; 0.5 means a probability of 0.622 (Q2).
    """
    best, channel = logits.max(2)
    return torch.where(best > threshold, channel + 1, 0)


def feature_sums(features: Tensor, codes: Tensor, classes: int) -> dict[str, Tensor]:
    """Sums for prototypes and norms: unit vectors, cells, norms and squared norms of each class.

    Args:
        features: ``(N, D, *s)``.
        codes: ``(N, *s)``.
        classes: Number of new classes C.

    Returns:
        ``directions (C, D)`` float64, ``cells (C,)`` int64, ``norms (C,)`` and ``squares (C,)`` float64.
    """
    vectors, rows = _labelled(features, codes)
    norms = vectors.norm(dim=1)
    return {
        "directions": vectors.new_zeros(classes, features.shape[1]).index_add_(0, rows, F.normalize(vectors, dim=1)),
        "cells": torch.bincount(rows, minlength=classes),
        "norms": norms.new_zeros(classes).index_add_(0, rows, norms),
        "squares": norms.new_zeros(classes).index_add_(0, rows, norms.square()),
    }


def spread_sums(features: Tensor, codes: Tensor, centres: Tensor) -> dict[str, Tensor]:
    """Sums for spreads: squared distance to the centre, channel by channel.

    Args:
        features: ``(N, D, *s)``.
        codes: ``(N, *s)``.
        centres: ``(C, D)`` prototype of each new class.

    Returns:
        ``squares (C, D)`` float64, ``cells (C,)`` int64.
    """
    vectors, rows = _labelled(features, codes)
    squares = (F.normalize(vectors, dim=1) - centres.double()[rows]).square()
    return {
        "squares": torch.zeros_like(centres, dtype=torch.float64).index_add_(0, rows, squares),
        "cells": torch.bincount(rows, minlength=len(centres)),
    }


def prototypes_from(sums: dict[str, Tensor]) -> Tensor:
    """Unit sums of unit vectors, ``(C, D)``; zeros for a class without cells."""
    return F.normalize(sums["directions"], dim=1)


def norms_from(sums: dict[str, Tensor]) -> Tensor:
    """Mean and unbiased standard deviation of the norms, ``(C, 2)``; 0 where there are too few cells."""
    cells = sums["cells"].double()
    mean = sums["norms"] / cells.clamp_min(1.0)
    around = (sums["squares"] - mean * sums["norms"]).clamp_min(0.0)
    return torch.stack([mean, (around / (cells - 1.0).clamp_min(1.0)).sqrt()], 1)


def spreads_from(sums: dict[str, Tensor]) -> Tensor:
    """Root mean squared distance to the centre by channel, ``(C, D)``; zeros for a class without cells."""
    return (sums["squares"] / sums["cells"].double().clamp_min(1.0)[:, None]).sqrt()


def _labelled(features: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors ``(M, D)`` float64 of the cells that count, and their rows ``(M,)``."""
    counts = codes >= 0
    return features.movedim(1, -1)[counts].double(), codes[counts]
