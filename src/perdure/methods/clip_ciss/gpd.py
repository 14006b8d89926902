"""Generalisation-preserving distillation (specification 3.4): how image regions lie relative to class texts.

What is held is not the features themselves but their cosine to every class text, for regions and for whole images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.methods.clip_ciss.regions import Regions
from perdure.methods.losses import resizer, shrink

TINY = 1e-8
"""Added to the student's probability inside the logarithm, as published."""
AT_ONCE = 16
"""Masks that are widened to float32 at a time: 100 of 512 × 512 would be 100 MiB."""


def pixel_weights(masks: Tensor, size: torch.Size) -> Tensor:
    """What each cell of a small map contributes to the mean of its upsampled self over a mask, ``(P, *size)`` float32.

    Upsampling is linear, so the mean of an upsampled map over a mask is a weighted sum of the small map. The weights
    are the mask through the transpose of the interpolation: ``U_hᵀ m U_w / Σ m`` with one matrix per axis. The map of
    512 × 512 × 512 numbers per image is never made. Float32 also under autocast: the weight of one pixel of a whole
    image, 1 / 262144, is subnormal in half precision.

    Args:
        masks: ``(P, *S)`` bool.
        size: Spatial size of the map.
    """
    like = torch.empty(0, device=masks.device)
    with torch.autocast(masks.device.type, enabled=False):
        matrices = [resizer(small, side, like) for small, side in zip(size, masks.shape[1:], strict=True)]
        return torch.cat([_shares(part.unsqueeze(1).float(), matrices) for part in torch.split(masks, AT_ONCE)])


def _shares(masks: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    area = masks.flatten(1).sum(1).clamp_min(1).view(-1, *[1] * len(matrices))
    return shrink(masks, matrices)[:, 0] / area


def region_means(features: Tensor, images: Tensor, weights: Tensor) -> Tensor:
    """Mean feature of each region at full resolution, ``(P, D)`` float32, not normalised.

    Args:
        features: ``(B, D, *s)``.
        images: ``(P,)``: image of each region.
        weights: ``(P, *s)`` from :func:`pixel_weights`.
    """
    means = features.new_zeros(len(images), features.shape[1], dtype=torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        for image, one in enumerate(features):
            here = images == image
            means = means.index_put((here,), weights[here].flatten(1) @ one.float().flatten(1).t())
    return means


def relation_loss(features: Tensor, old_features: Tensor, text: Tensor, regions: Regions, chunk: int = 2) -> Tensor:
    """L_rel: squared change of the cosines between class prototypes of a few images and all texts, summed.

    The prototype of a class is the normalised mean of its regions' means. Sums over classes and texts grow with the
    number of images that are looked at together, so the loss is taken over ``chunk`` images at a time (two, as on each
    published GPU) and averaged over the chunks: it does not depend on the batch size.

    Args:
        features: Dense map ``(B, D, *s)``.
        old_features: Of the teacher, same shape; no gradient flows there.
        text: ``(C, D)`` unit rows of all classes seen so far; no gradient.
        regions: Masks and their columns in ``text``.
        chunk: Images that are looked at together.

    Returns:
        Scalar float32; a chunk without regions counts 0.
    """
    total = features.new_zeros((), dtype=torch.float32)
    text, classes = text.detach().float(), len(text)
    starts = range(0, len(features), chunk)
    for first in starts:
        here = regions.of(first, first + chunk)
        if not len(here.images):
            continue
        weights = pixel_weights(here.masks, features.shape[2:])
        new, old = (
            _prototypes(region_means(maps[first : first + chunk], here.images, weights), here.columns, classes)
            for maps in (features, old_features.detach())
        )
        with torch.autocast(text.device.type, enabled=False):
            total = total + ((new - old) @ text.t()).square().sum()
    return total / max(1, len(starts))


def _prototypes(means: Tensor, columns: Tensor, classes: int) -> Tensor:
    """Unit mean of each class's regions ``(classes, D)``; zeros for classes without any."""
    sums = means.new_zeros(classes, means.shape[1]).index_add(0, columns, means)
    return F.normalize(sums, dim=1)  # of the sum or of the mean: the direction is the same


def global_loss(embedding: Tensor, old_embedding: Tensor, text: Tensor, temperature: float = 1.0) -> Tensor:
    """L_glob: Kullback-Leibler divergence of the images' class distributions from the teacher's, mean over images.

    The distribution is the softmax of the cosines between image and texts. With temperature 1, as published, it is
    almost uniform and the term tiny; CLIP's own temperature is about 0.01.

    Args:
        embedding: ``(B, D)`` unit vectors of the images.
        old_embedding: Of the teacher; no gradient flows there.
        text: ``(C, D)`` unit rows; no gradient.
        temperature: The cosines are divided by it.
    """
    text = text.detach().float()
    with torch.autocast(text.device.type, enabled=False):
        new = (embedding.float() @ text.t() / temperature).softmax(1)
        old = (old_embedding.detach().float() @ text.t() / temperature).log_softmax(1)
    return (old.exp() * (old - (new + TINY).log())).sum(1).mean()
