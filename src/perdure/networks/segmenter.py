"""A segmentation network whose classifiers grow: body -> features -> one 1x1 classifier a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.errors import UsageError
from perdure.networks.layers import freeze_affine, hold_still
from perdure.networks.weights import Weights


class Segmenter(nn.Module):
    """A body that makes features, and one linear classifier a task on top (spec STAR 2.3).

    There is no background channel: which class a channel stands for is the method's business.

    Args:
        body: Image ``(N, C, *S)`` -> features ``(N, width, *s)`` with ``s = S / stride``. Where it has a part
            called ``neck``, that part is its own group of parameters.
        width: Channels of the features that feed the classifiers.
        stride: Input pixels a feature cell, along every axis.
        dims: 2 or 3.
        multiple: Each axis of the input must be a multiple of this; the stride if not given.
        in_channels: Channels of the input, checked where given.
        least_batch: Fewest images that it can train on at once.
        weights: What the body was initialised with.

    Attributes:
        body: The feature extractor.
        classifiers: One 1x1 convolution with bias a task, in task order.
        norm_frozen: True after :meth:`freeze_norm`.
    """

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
        super().__init__()
        if dims not in (2, 3):
            raise UsageError(f"a segmenter has 2 or 3 dimensions, not {dims}", "set dims to 2 or 3")
        self.body = body
        self.classifiers = nn.ModuleList()
        self.width = width
        self.stride = stride
        self.dims = dims
        self.multiple = tuple(multiple) if multiple is not None else (stride,) * dims
        self.in_channels = in_channels
        self.least_batch = least_batch
        self.weights = weights if weights is not None else Weights("random")
        self.norm_frozen = False

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(N, K, *s)`` of all classifiers, and the features ``(N, width, *s)`` they were made from."""
        features = self.features(images)
        return self.classify(features), features

    def features(self, images: Tensor) -> Tensor:
        """Feature map ``(N, width, *s)`` of images ``(N, C, *S)``.

        Raises:
            UsageError: The network cannot take images of this shape.
        """
        if images.ndim != self.dims + 2:
            raise UsageError(
                f"the network takes batches of {self.dims}D images, not a tensor of shape {tuple(images.shape)}",
                f"give (N, C, {'H, W' if self.dims == 2 else 'D, H, W'}), or a network with other dims",
            )
        if self.in_channels is not None and images.shape[1] != self.in_channels:
            raise UsageError(
                f"the network takes images with {self.in_channels} channels, not {images.shape[1]}",
                f"build it with in_channels={images.shape[1]}, or convert the images",
            )
        self.check_size(images.shape[2:])
        features: Tensor = self.body(images)
        return features

    def check_size(self, size: Sequence[int]) -> None:
        """Raise UsageError unless an image or crop of ``size`` (pixels or voxels an axis) fits the strides.

        Otherwise labels sub-sampled to the feature grid and the features would disagree (513 at stride 16
        gives 33 cells but 32 labels).
        """
        if len(size) != self.dims:
            raise UsageError(
                f"a {self.dims}D network cannot take a size of {len(size)} axes", "check dims and the crop"
            )
        if all(side > 0 and side % step == 0 for side, step in zip(size, self.multiple, strict=True)):
            return
        usable = [max(round(side / step), 1) * step for side, step in zip(size, self.multiple, strict=True)]
        raise UsageError(
            f"the network cannot take inputs of {_times(size)}: the axes must be multiples of {_times(self.multiple)}",
            f"crop or pad to a fitting size, for example {_times(usable)}",
        )

    def classify(self, features: Tensor, first: int = 0) -> Tensor:
        """Logits ``(N, K, *s)`` of ``classifiers[first:]``, in task order, on any features ``(N, width, *s)``.

        Args:
            features: A feature map, or replayed features laid out as one, such as ``(1, width, K, 1)``.
            first: First classifier used; negative counts from the end, as in a slice.
        """
        chosen = list(self.classifiers)[first:]
        if not chosen:
            return features.new_zeros(features.shape[0], 0, *features.shape[2:])
        logits = [classifier(features) for classifier in chosen]
        return logits[0] if len(logits) == 1 else torch.cat(logits, 1)

    def full_logits(self, images: Tensor) -> Tensor:
        """Logits ``(N, K, *S)`` at the size of images of any size; for prediction, not for training.

        Where an axis is no multiple of what the network takes, the image's edge is repeated up to the next one
        and cut off again afterwards.
        """
        size = images.shape[2:]
        missing = [-side % step for side, step in zip(size, self.multiple, strict=True)]
        if any(missing):
            # F.pad counts from the last axis; right and bottom only, so that positions stay what they are
            images = F.pad(images, [n for extra in reversed(missing) for n in (0, extra)], mode="replicate")
        logits = upsample(self.classify(self.features(images)).float(), images.shape[2:])
        return logits[(slice(None), slice(None), *(slice(side) for side in size))]

    def grow(self, classes: int) -> None:
        """Append a classifier for ``classes`` new classes; the earlier ones are not touched.

        Weights are Kaiming normal (std √(2 / width)), biases uniform in ±1/√width (spec STAR 2.3), drawn on
        the CPU so that the same seed gives the same values on every device.
        """
        if classes < 1:
            raise ValueError(f"a classifier needs at least one class, not {classes}")
        kind = nn.Conv2d if self.dims == 2 else nn.Conv3d
        classifier = kind(self.width, classes, kernel_size=1, device="cpu", dtype=torch.float32)
        nn.init.kaiming_normal_(classifier.weight, mode="fan_in", nonlinearity="relu")
        like = next(self.body.parameters(), None)
        if like is not None:
            classifier = classifier.to(device=like.device, dtype=like.dtype)
        self.classifiers.append(classifier.train(self.training))

    def freeze_norm(self) -> None:
        """Keep normalisation as it is from now on, also in train mode, and switch dropout off (spec STAR 2.5).

        Running statistics stay as they are; scale and shift of all normalisation layers lose
        ``requires_grad``. Convolutions stay trainable.
        """
        self.norm_frozen = True
        freeze_affine(self)
        hold_still(self)

    def freeze_old_classifiers(self) -> None:
        """Take all classifiers but the newest out of training: weight decay must not move them (spec STAR Q14)."""
        for classifier in list(self.classifiers)[:-1]:
            for parameter in classifier.parameters():
                parameter.requires_grad_(False)
                parameter.grad = None

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by part, each once; a part without any has an empty list.

        ``backbone`` (the body without its neck), ``neck`` (ASPP; empty where the body has none),
        ``old_classifiers`` (all but the newest) and ``new_classifier``.
        """
        neck = getattr(self.body, "neck", None)
        inside = {id(p) for p in neck.parameters()} if isinstance(neck, nn.Module) else set()
        body = list(self.body.parameters())
        parts = {
            "backbone": [p for p in body if id(p) not in inside],
            "neck": [p for p in body if id(p) in inside],
            "old_classifiers": [p for c in list(self.classifiers)[:-1] for p in c.parameters()],
            "new_classifier": [p for c in list(self.classifiers)[-1:] for p in c.parameters()],
        }
        return {name: [p for p in part if p.requires_grad] for name, part in parts.items()}

    def train(self, mode: bool = True) -> Self:
        """Set train or evaluation mode; frozen normalisation and dropout stay in evaluation mode."""
        super().train(mode)
        if self.norm_frozen:
            hold_still(self)
        return self


def upsample(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Resize logits ``(N, K, *s)`` to ``(N, K, *size)``, linear along each axis, ``align_corners`` off (spec STAR 1.7).

    Logits that have the size already come back as they are.
    """
    if tuple(logits.shape[2:]) == tuple(size):
        return logits
    mode = "trilinear" if logits.ndim == 5 else "bilinear"
    return F.interpolate(logits, size=list(size), mode=mode, align_corners=False)


def _times(size: Sequence[int]) -> str:
    return "×".join(str(side) for side in size)
