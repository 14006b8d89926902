"""A segmentation network whose classifiers grow: body -> feature map -> one 1x1 classifier per task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.data.source import Kind
from perdure.errors import UsageError
from perdure.networks.network import Encoded, GrowingNetwork
from perdure.networks.weights import Weights


class Segmenter(GrowingNetwork[Tensor]):
    """A body that makes a feature map, and one linear classifier per task on top of it (spec STAR 2.3).

    Args:
        body: Image ``(N, C, *S)`` -> features ``(N, width, *s)`` with ``s = S / stride``. Parameters of a part called
            ``neck`` are a group of their own.
        width: Channels of the features that the classifiers are applied to.
        stride: Input pixels per feature cell, along every axis.
        dims: 2 or 3.
        multiple: Each axis of the input must be a multiple of this; the stride if not given.
        in_channels: Channels of the input, checked where given.
        least_batch: Fewest images that it can train on at once.
        weights: What the body was initialised with; random if not given.

    Attributes:
        classifiers: One 1x1 convolution with bias per task, in task order.
    """

    kind: ClassVar[Kind] = "segmentation"

    def __init__(
        self,
        body: nn.Module,
        width: int,
        stride: int,
        dims: int,
        *,
        multiple: Sequence[int] | None = None,
        in_channels: int | None = None,
        least_batch: int = 1,
        weights: Weights | None = None,
    ) -> None:
        super().__init__(body, width, dims, in_channels=in_channels, least_batch=least_batch, weights=weights)
        self.classifiers = nn.ModuleList()
        self.stride = stride
        self.multiple = tuple(multiple) if multiple is not None else (stride,) * dims

    def check_size(self, size: Sequence[int]) -> None:
        """Raise UsageError unless every axis of ``size`` is a multiple of what the network takes."""
        super().check_size(size)
        if all(side > 0 and side % step == 0 for side, step in zip(size, self.multiple, strict=True)):
            return
        usable = [max(round(side / step), 1) * step for side, step in zip(size, self.multiple, strict=True)]
        given, steps, fitting = ("×".join(map(str, sides)) for sides in (size, self.multiple, usable))
        raise UsageError(
            f"the network cannot take inputs of {given}: the axes must be multiples of {steps}",
            f"crop or pad to a fitting size, for example {fitting}",
        )

    def classify(self, features: Tensor, first: int = 0, channels: Sequence[int] | None = None) -> Tensor:
        """Logits ``(N, K, *s)`` of ``classifiers[first:]``, in task order, on any features ``(N, width, *s)``.

        Args:
            features: A feature map, or replayed features laid out as one, such as ``(1, width, K, 1)``.
            first: First classifier used; negative counts from the end, as in a slice.
            channels: Compute these channels only, in this order; positions among those of ``classifiers[first:]``.
        """
        chosen = list(self.classifiers)[first:]
        if not chosen or (channels is not None and len(channels) == 0):  # a convolution needs a channel
            return features.new_zeros(features.shape[0], 0, *features.shape[2:])
        if channels is None:
            # one convolution per task: joining their weights first would copy all of them at every step
            logits = [classifier(features) for classifier in chosen]
            return logits[0] if len(logits) == 1 else torch.cat(logits, 1)
        weight, bias = (torch.cat([c.get_parameter(n) for c in chosen])[list(channels)] for n in ("weight", "bias"))
        return (F.conv2d if self.dims == 2 else F.conv3d)(features, weight, bias)

    def encode(self, images: Tensor) -> Encoded[Tensor]:
        """Features of images ``(N, C, *S)`` of any size; for prediction, not for training.

        Where an axis is no multiple of what the network takes, the image's edge is repeated up to the next one.
        """
        size = tuple(images.shape[2:])
        images = padded(images, self.multiple)
        return Encoded(self.features(images), tuple(images.shape[2:]), size)

    def score(self, encoded: Encoded[Tensor], channels: Sequence[int] | None = None) -> Tensor:
        """Float32 logits ``(N, K, *S)`` at the images' size, upsampled from the feature map.

        Args:
            encoded: From :meth:`encode`.
            channels: Positions of the wanted classes over all tasks; all if not given.
        """
        logits = upsample(self.classify(encoded.features, channels=channels).float(), encoded.padded_size)
        return logits[(slice(None), slice(None), *(slice(side) for side in encoded.size))]

    def grow(self, classes: int) -> None:
        """Append a classifier for ``classes`` new classes; the earlier ones are not changed.

        Weights are Kaiming normal (std √(2 / width)), biases uniform in ±1/√width (spec STAR 2.3), drawn on
        the CPU so that a seed gives the same values on every device.
        """
        if classes < 1:
            raise ValueError(f"a classifier needs at least one class, not {classes}")
        convolution = nn.Conv2d if self.dims == 2 else nn.Conv3d
        classifier = convolution(self.width, classes, kernel_size=1, device="cpu", dtype=torch.float32)
        nn.init.kaiming_normal_(classifier.weight, mode="fan_in", nonlinearity="relu")
        like = next(self.body.parameters(), None)
        if like is not None:
            classifier = classifier.to(device=like.device, dtype=like.dtype)
        self.classifiers.append(classifier.train(self.training))

    def classifier_parameters(self) -> list[list[nn.Parameter]]:
        """Weight and bias of the classifier of each task."""
        return [list(classifier.parameters()) for classifier in self.classifiers]


def padded(images: Tensor, multiple: Sequence[int]) -> Tensor:
    """Images ``(N, C, *S)`` with their edge repeated until each axis is a multiple of its number."""
    missing = [-side % step for side, step in zip(images.shape[2:], multiple, strict=True)]
    if not any(missing):
        return images
    # F.pad counts from the last axis; right and bottom only, so that positions stay what they are
    return F.pad(images, [n for extra in reversed(missing) for n in (0, extra)], mode="replicate")


def upsample(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Resize logits ``(N, K, *s)`` to ``(N, K, *size)``, linear along each axis, ``align_corners`` off (spec STAR 1.7).

    Logits that have the size already come back as they are.
    """
    if tuple(logits.shape[2:]) == tuple(size):
        return logits
    if not logits.shape[1]:
        return logits.new_zeros(*logits.shape[:2], *size)  # torch does not resize maps without channels
    mode = "trilinear" if logits.ndim == 5 else "bilinear"
    return F.interpolate(logits, size=list(size), mode=mode, align_corners=False)
