"""A classification network that grows: body -> one feature vector an image -> cosine head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from torch import Tensor, nn

from perdure.errors import UsageError
from perdure.networks.cosine_head import CosineHead
from perdure.networks.layers import freeze_affine, hold_still
from perdure.networks.weights import Weights


class Classifier(nn.Module):
    """A body that makes one feature vector an image, and a cosine head with one matrix a task on top (spec CCSI 2).

    What a Segmenter is to segmentation. Which class a channel stands for is the method's business.

    Args:
        body: Image ``(N, C, H, W)`` -> features ``(N, width)``.
        width: Length of the features.
        in_channels: Channels of the input, checked where given.
        sides: Sides in pixels of the square images that the body turns into features of this width; any image if
            not given.
        least_batch: Fewest images that it can train on at once.
        weights: What the body was initialised with.

    Attributes:
        body: The feature extractor.
        head: Class directions and scale.
        norm_frozen: True after :meth:`freeze_norm`.
    """

    def __init__(
        self,
        body: nn.Module,
        width: int,
        *,
        in_channels: int | None = None,
        sides: range | None = None,
        least_batch: int = 1,
        weights: Weights | None = None,
    ) -> None:
        super().__init__()
        self.body = body
        self.head = CosineHead(width)
        self.width = width
        self.in_channels = in_channels
        self.sides = sides
        self.least_batch = least_batch
        self.weights = weights if weights is not None else Weights("random")
        self.norm_frozen = False

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(N, K)`` of all classes, and the features ``(N, width)`` they were made from."""
        features = self.features(images)
        return self.classify(features), features

    def features(self, images: Tensor) -> Tensor:
        """Features ``(N, width)`` of images ``(N, C, H, W)``.

        Raises:
            UsageError: The network cannot take images of this shape.
        """
        if images.ndim != 4:
            raise UsageError(
                f"the network takes batches of 2D images, not a tensor of shape {tuple(images.shape)}",
                "give (N, C, H, W)",
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
        """Raise UsageError unless images of ``size`` (height and width in pixels) give features of the width."""
        if len(size) != 2:
            raise UsageError(f"a 2D network cannot take a size of {len(size)} axes", "give height and width")
        if self.sides is None or (size[0] == size[1] and size[0] in self.sides):
            return
        known = f"the network takes square images of {self.sides[0]} to {self.sides[-1]} pixels a side"
        if size[0] != size[1]:
            raise UsageError(f"{known}, not {size[0]}×{size[1]}", "pad or crop the images to squares")
        raise UsageError(
            f"{known}, not {size[0]}×{size[1]}", f"scale the images, or build the network with side={size[0]}"
        )

    def cosines(self, features: Tensor, first: int = 0) -> Tensor:
        """Raw cosines ``(N, K)`` of features ``(N, width)`` with the classes of the tasks from ``first`` on."""
        return self.head.cosines(features, first)

    def classify(self, features: Tensor, first: int = 0) -> Tensor:
        """Logits ``(N, K)``: the cosines times the scale.

        Args:
            features: Of images, or replayed ones ``(N, width)``.
            first: First task whose classes take part; negative counts from the end, as in a slice.
        """
        logits: Tensor = self.head(features, first)
        return logits

    def grow(self, classes: int) -> None:
        """Append rows for ``classes`` new classes, uniform in ±1/√width; see :meth:`CosineHead.grow`."""
        self.head.grow(classes)

    def imprint(self, directions: Tensor) -> None:
        """Set the newest rows to directions ``(n_t, width)``, as long as old rows are; see `CosineHead.imprint`."""
        self.head.imprint(directions)

    def freeze_norm(self) -> None:
        """Keep normalisation as it is from now on, also in train mode, and switch dropout off.

        Running and group statistics stay as they are; scale and shift of all normalisation layers lose
        ``requires_grad``. Convolutions stay trainable.
        """
        self.norm_frozen = True
        freeze_affine(self)
        hold_still(self)

    def freeze_old_classifiers(self) -> None:
        """Take the rows of all tasks but the newest out of training (spec CCSI 4.5). The scale goes on learning."""
        for rows in list(self.head.rows)[:-1]:
            rows.requires_grad_(False)
            rows.grad = None

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by part, each once; a part without any has an empty list.

        ``backbone`` (the body), ``neck`` (always empty, as in a Segmenter without one), ``old_classifiers`` (all
        rows but the newest), ``new_classifier`` and ``scale``.
        """
        rows = list(self.head.rows)
        parts = {
            "backbone": list(self.body.parameters()),
            "neck": [],
            "old_classifiers": rows[:-1],
            "new_classifier": rows[-1:],
            "scale": [self.head.scale],
        }
        return {name: [p for p in part if p.requires_grad] for name, part in parts.items()}

    def train(self, mode: bool = True) -> Self:
        """Set train or evaluation mode; frozen normalisation and dropout stay in evaluation mode."""
        super().train(mode)
        if self.norm_frozen:
            hold_still(self)
        return self
