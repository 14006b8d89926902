"""A segmentation network whose classifiers grow: body -> features -> one 1x1 classifier a task."""

from __future__ import annotations

from torch import Tensor, nn


class Segmenter(nn.Module):
    """Contract (filled in by the networks room).

    Attributes:
        body: image ``(N, C, *S)`` -> features ``(N, width, *s)``, ``s = S / stride``.
        classifiers: one 1x1 convolution with bias a task, in task order.
        width: channels of the feature map that feeds the classifiers.
        stride: input pixels a feature-map cell.
        dims: 2 or 3.
    """

    body: nn.Module
    classifiers: nn.ModuleList
    width: int
    stride: int
    dims: int

    def features(self, images: Tensor) -> Tensor:
        """Feature map ``(N, width, *s)``."""
        raise NotImplementedError

    def classify(self, features: Tensor, first: int = 0) -> Tensor:
        """Logits ``(N, channels of classifiers[first:], *s)``; negative ``first`` counts from the end."""
        raise NotImplementedError

    def grow(self, classes: int) -> None:
        """Append a classifier for ``classes`` new classes."""
        raise NotImplementedError

    def freeze_norm(self) -> None:
        """Freeze normalisation statistics and affine parameters and switch dropout off, also in train mode."""
        raise NotImplementedError

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by part: ``backbone``, ``neck``, ``old_classifiers``, ``new_classifier``."""
        raise NotImplementedError
