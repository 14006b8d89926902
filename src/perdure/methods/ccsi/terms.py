"""The four losses of the update (spec CCSI, section 4), as pure functions of tensors.

All compute in float32, whatever the precision of their input and of an autocast around them.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

TINY: Final = 1e-10


def class_weights(counts: Tensor) -> Tensor:
    """a_k = n_max / n_k of 4.2, float32 ``(K,)``; 0 for a class without samples, which no sample can ask for."""
    counts = counts.float()
    return torch.where(counts > 0, counts.max() / counts.clamp(min=1), 0.0)


def weighted_ce(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """Cosine-normalised cross-entropy (4.2): Σ a_y (−log softmax(ℓ)_y) / Σ a_y.

    Args:
        logits: Scaled cosines ``(N, K)``.
        targets: Channels ``(N,)`` int64.
        weights: a ``(K,)``, or ``None`` for 1 everywhere.
    """
    return F.cross_entropy(logits.float(), targets, weights)


def less_forget(features: Tensor, before: Tensor) -> Tensor:
    """Less-forget distillation (4.3) without λ: mean over samples of 1 − cos of features ``(N, d)`` now and before."""
    return (1.0 - F.cosine_similarity(features.float(), before.float(), dim=1)).mean()


def less_forget_weight(base: float, old: int, step: int) -> float:
    """λ_t = base √(O_t / c) of 4.3: ``old`` classes are known, ``step`` is the regular number of new ones."""
    return float(base * (old / step) ** 0.5)


def margin_ranking(cosines: Tensor, targets: Tensor, old: int, margin: float, top: int) -> Tensor:
    """Margin ranking (4.4): old samples must lie closer to their class than to the nearest new classes.

    Mean over samples with target < ``old``, and over their ``top`` highest cosines among new classes, of
    max(0, margin − s_y + s_new). Zero, with a zero gradient, where the batch has no old sample.

    Args:
        cosines: Raw cosines s ``(N, K)``, old classes first.
        targets: Channels ``(N,)`` int64.
        old: Number of old classes.
        margin: m.
        top: Number of new classes that each sample is held against; all of them if there are fewer.
    """
    cosines, mine = cosines.float(), targets < old
    own = cosines.gather(1, targets[:, None])
    rivals = cosines[:, old:].topk(min(top, cosines.shape[1] - old), dim=1).values
    each = F.relu(margin - own + rivals).mean(1)
    return (each * mine).sum() / mine.sum().clamp(min=1)


def centroids(cosines: Tensor, channels: Tensor) -> Tensor:
    """Mean cosine vector of each class ``(K, K)``: row k is the mean over samples of channel k, 0 without any.

    Args:
        cosines: Raw cosines ``(N, K)``.
        channels: Class of each sample ``(N,)`` int64; labels or pseudo-labels.
    """
    cosines, classes = cosines.float(), cosines.shape[1]
    sums = cosines.new_zeros(classes, classes).index_add(0, channels, cosines)
    counts = torch.bincount(channels, minlength=classes).clamp(min=1)
    return sums / counts[:, None].to(sums)


def moving(before: Tensor, now: Tensor, momentum: float) -> Tensor:
    """C ← (1 − ρ) stopgrad(C) + ρ c of 4.6; an absent class only shrinks, which keeps its direction."""
    return (1.0 - momentum) * before.detach() + momentum * now


def idc(source: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Intra-domain contrastive loss (4.6): centroids of unlabelled images should lie along those of labelled ones.

    −log Σ_k R_kk + log Σ_kj R_kj with R_kj = exp(⟨Ĉ^T_k, Ĉ^S_j⟩ / τ). One ratio of sums, as published.

    Args:
        source: Moving centroids C^S ``(K, K)`` of the labelled batch.
        target: Moving centroids C^T ``(K, K)`` of the unlabelled batch.
        temperature: τ.
    """
    # a product under autocast would round the scores to half precision, and the loss with them, to steps of 0.01
    with torch.autocast(source.device.type, enabled=False):
        source, target = (
            rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + TINY)
            for rows in (source.float(), target.float())
        )
        scores = target @ source.T / temperature
    return scores.flatten().logsumexp(0) - scores.diagonal().logsumexp(0)
