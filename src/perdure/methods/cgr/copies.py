"""Whether generated images are copies of the images that the generator learned from.

Checked while the task's data is open, before a pair is stored. Two distances to every real image count: of pixels after
a low-pass, for all small shifts and both mirrorings, and of features of the segmenter. What is nearer than real images
of different patients are to each other is taken for a copy, and so is what equals a real image.

A generator can also remember an image of an earlier task and give it away later, when there is nothing left to compare
with: only the first pairs of each task are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.data.dataset import Samples, members
from perdure.methods.cgr.codecs import Ends, encode_image

SIDE: Final = 16
"""Cells per axis of an image after the low-pass."""
REFERENCES: Final = 64
"""Real images per task whose nearest other one says how alike real images are."""
AT_ONCE: Final = 16
"""Images whose features are computed at a time: a volume has hundreds of slices."""
NEAR: Final = 0.5
"""A copy is nearer than this share of the distance below which one in twenty real images has its nearest one."""
USUAL: Final = 0.2
"""Or than this share of the median of these distances: some near-copies in the data itself must not lift the check."""
SAME: Final = 0.002
"""Images nearer than this are the same, by pixels: half a grey level of 256. No limit is lower."""
GREY_LOOKS: Final = 16
"""Cases whose channels tell whether a task's images are grey."""
Features = Callable[[Tensor], Tensor]
"""Prepared images ``(N, C, H, W)`` -> one vector each, ``(N, d)``."""


class Found(NamedTuple):
    """What a check of images found.

    Args:
        distances: ``(N, 2)`` float32: to the nearest real image, by pixels (root mean square of grey values, 0 to 1)
            and by features (1 − cosine).
        copies: ``(N,)`` bool: nearer than the limit by either.
    """

    distances: Tensor
    copies: Tensor


class RealImages:
    """A task's real images as far as the check needs them; held in memory while pairs are made.

    Args:
        samples: The training data, which is read once, without augmentation; of a volume all slices.
        ends: What black and white are in its prepared images.
        features: Of the trained segmenter.

    Attributes:
        limits: ``(2,)`` float32, distances below which an image is a copy. With fewer than three groups nothing tells
            how alike patients are: only what is the same as a real image is a copy then.
    """

    def __init__(self, samples: Samples, ends: Ends, features: Features) -> None:
        self.ends, self.features = ends, features
        pixels, vectors, groups, chosen, places = [], [], list[str](), list[Tensor](), list[int]()
        for images, group in whole_images(samples):
            grey = low_pass(encode_image(images, ends))
            shown = _usual(grey)
            chosen.append(images[shown : shown + 1])
            places.append(len(groups) + shown)
            pixels.append(grey)
            vectors += [F.normalize(features(some).float().cpu(), dim=1) for some in torch.split(images, AT_ONCE)]
            groups += [group] * len(images)
        self.pixels, self.vectors = torch.cat(pixels), torch.cat(vectors)
        step = -(-len(chosen) // REFERENCES)
        names = sorted(set(groups), key=groups.index)
        number = torch.tensor([names.index(group) for group in groups])
        itself = number[None] == number[places[::step]][:, None]
        nearest = torch.cat(
            [self._distances(image, mask[None]) for image, mask in zip(chosen[::step], itself, strict=True)]
        )
        nearest = nearest[nearest.isfinite().all(1)]
        self.limits = torch.tensor([SAME, 0.0])
        if len(names) > 2 and len(nearest):
            low, median = nearest.quantile(torch.tensor([0.05, 0.5]), 0)
            self.limits = torch.maximum(self.limits, torch.maximum(NEAR * low, USUAL * median))

    def check(self, images: Tensor) -> Found:
        """Compare prepared images ``(N, C, H, W)`` with all real ones."""
        distances = self._distances(images, None)
        return Found(distances, (distances < self.limits).any(1))

    def _distances(self, images: Tensor, without: Tensor | None) -> Tensor:
        """``(N, 2)``; real images ``without (N, M)`` do not count, and then neither do those that are the same."""
        by_pixels = torch.full((len(images), len(self.pixels)), torch.inf)
        for moved, inside in variants(encode_image(images, self.ends)):
            apart = torch.cdist(low_pass(moved)[:, inside], self.pixels[:, inside]) / int(inside.sum()) ** 0.5
            by_pixels = torch.minimum(by_pixels, apart)
        by_features = 1.0 - F.normalize(self.features(images).float().cpu(), dim=1) @ self.vectors.T
        both = torch.stack([by_pixels, by_features])
        if without is not None:
            both = both.masked_fill(without | (by_pixels < SAME), torch.inf)
        return both.amin(2).T


def _usual(grey: Tensor) -> int:
    """The slice ``(n, d)`` of a volume with the median contrast of those that are not empty.

    Its first slices may be air, which is alike everywhere, and those that show most are like no other.
    """
    contrast = grey.std(1, correction=0)
    by_contrast = contrast.argsort(stable=True)
    filled = by_contrast[int((contrast < SAME).sum()) :]
    return int((filled if len(filled) else by_contrast)[(len(filled) or len(by_contrast)) // 2])


def low_pass(images: Tensor) -> Tensor:
    """Images ``(N, C, H, W)`` from −1 to 1 as grey values of 0 to 1 on a grid of at most 16 × 16, ``(N, d)``."""
    side = (min(SIDE, images.shape[2]), min(SIDE, images.shape[3]))
    return (0.5 + 0.5 * F.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), side)).flatten(1).cpu()


def variants(images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Images ``(N, C, H, W)`` mirrored along no, one or both axes, and shifted by up to a cell of the low-pass.

    Each comes with the cells ``(d,)`` bool of the low-pass that hold nothing but the image: a strip that a shift leaves
    empty says nothing, and would make shifted copies look far away.
    """
    height, width = (max(1, length // (2 * SIDE)) for length in images.shape[2:])  # half a cell
    border = (2 * width, 2 * width, 2 * height, 2 * height)
    there = F.pad(torch.ones_like(images[:1]), border)
    for axes in ((), (2,), (3,), (2, 3)):
        padded = F.pad(images.flip(axes), border)
        for y in range(0, 5 * height, height):
            for x in range(0, 5 * width, width):
                moved, part = (each[..., y : y + images.shape[2], x : x + images.shape[3]] for each in (padded, there))
                yield moved, low_pass(part)[0] > 1 - 1e-6


def all_grey(samples: Samples) -> bool:
    """Whether the first cases have equal channels, as they are shown without augmentation, which tints images."""
    shown = (images for images, _ in islice(whole_images(samples), GREY_LOOKS))
    return all(bool(((images - images[:, :1]).abs() < 1e-3).all()) for images in shown)


def whole_images(samples: Samples) -> Iterator[tuple[Tensor, str]]:
    """Prepared images ``(n, C, H, W)`` of each case without augmentation, and its group; of a volume all slices."""
    datasets = members(samples)
    for dataset in datasets:
        for position in range(len(dataset)):
            case = dataset.read(position)
            image = dataset.preparation.show(case).image
            yield (image[None] if image.ndim == 3 else image.transpose(0, 1)), case.group or case.name
    for position in range(0 if datasets else len(samples)):
        case = samples[position]
        yield case.image[None], case.group or case.name
