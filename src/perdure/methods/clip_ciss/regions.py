"""Regions of images that belong to a class: from labels, or from what the previous model says of old classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from perdure.methods.losses import channels_of
from perdure.networks.segmenter import upsample


class Regions(NamedTuple):
    """P masks of a batch, each of one class in one image.

    Args:
        images: ``(P,)`` int64: the image of each mask.
        columns: ``(P,)`` int64: its class, as a position among the classes seen so far.
        masks: ``(P, *S)`` bool.
    """

    images: Tensor
    columns: Tensor
    masks: Tensor

    def joined(self, more: Regions) -> Regions:
        """These and more."""
        return Regions(*(torch.cat(pair) for pair in zip(self, more, strict=True)))

    def of(self, first: int, stop: int) -> Self:
        """The regions of the images ``first .. stop - 1``, which are counted from 0 again."""
        here = (self.images >= first) & (self.images < stop)
        return self._replace(images=self.images[here] - first, columns=self.columns[here], masks=self.masks[here])


def labelled(labels: Tensor, class_ids: Sequence[int]) -> Regions:
    """A region for every class that an image shows, ordered by image and class.

    Args:
        labels: ``(B, *S)`` int64 global ids. Any other label, ignored pixels included, lies in no mask (as published).
        class_ids: Global id of each column.
    """
    channels = channels_of(labels, class_ids)
    flat = channels.flatten(1)
    shown = torch.zeros(len(labels), len(class_ids) + 1, dtype=torch.bool, device=labels.device)
    shown.scatter_(1, flat + 1, True)  # entry 0 takes the -1 of labels that are no class
    images, columns = shown[:, 1:].nonzero(as_tuple=True)
    place = columns.view(-1, *[1] * (labels.dim() - 1))
    return Regions(images, columns, channels[images] == place)


@torch.no_grad()
def believed(
    presence: Tensor,
    logits: Tensor,
    taken: Tensor,
    threshold: float,
    keep: float = 0.5,
    ratio: float = 0.5,
) -> Regions:
    """Pseudo masks of old classes, image by image (specification 3.5); they feed GPD only.

    Every pixel that no label has taken belongs to the class with the highest ``P(present) sigmoid(mask)`` among those
    that the previous model finds likely to be present. A class is believed where it owns more than ``ratio`` of the
    pixels at which its own mask reaches the threshold.

    With threshold 0, as in the published runs, every pixel reaches it. Then a class is believed only if it owns more
    than half of the whole image: at most one mask per image, background included. CoMFormer, where the rule comes
    from, uses 0.5.

    Args:
        presence: ``(B, K)`` probability that each old class is in the image.
        logits: ``(B, K, *s)`` mask logits.
        taken: ``(B, *S)`` bool: pixels that a label gives to a class.
        threshold: Least sigmoid of the mask.
        keep: Classes at or below this probability are left out; only the masks of the others are upsampled.
        ratio: Least share of its own mask that a class must own.

    Returns:
        Regions whose columns are positions among the K classes.
    """
    images, columns, masks = [], [], []
    for image, (likely, small, covered) in enumerate(zip(presence, logits, taken, strict=True)):
        (kept,) = (likely > keep).nonzero(as_tuple=True)
        if not len(kept):
            continue
        shares = upsample(small[kept][None].float(), covered.shape)[0].sigmoid()
        weight = likely[kept].float().view(-1, *[1] * covered.dim())
        owner = (weight * shares).argmax(0).masked_fill(covered, -1)
        own = owner == torch.arange(len(kept), device=owner.device).view_as(weight)
        reached = shares >= threshold
        candidates = own & reached
        area, reach, found = (part.flatten(1).sum(1) for part in (own, reached, candidates))
        accepted = (found > 0) & (area > ratio * reach)  # a mask that is found has an area and reaches the threshold
        masks.append(candidates[accepted])
        columns.append(kept[accepted])
        images.append(torch.full_like(kept[accepted], image))
    if not masks:
        none = taken.new_zeros(0, dtype=torch.int64)
        return Regions(none, none, taken[:0])
    return Regions(torch.cat(images), torch.cat(columns), torch.cat(masks))
