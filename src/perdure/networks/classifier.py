"""A classification network that grows: body -> one feature vector per image -> cosine head (spec CCSI 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.data.source import Kind
from perdure.errors import PerdureError, UsageError
from perdure.networks.network import GrowingNetwork
from perdure.networks.weights import Weights

EPS = 1e-12


class CosineHead(nn.Module):
    """Logits ℓ_k = σ cos(f, w_k), without bias; one matrix of class directions per task, one shared scale.

    With one task this is the published single head, with more the published split head (old and new rows under one
    scale): both compute the same, for a row does not depend on the others (spec CCSI 2.2, 2.4).

    Args:
        width: Length d of the features.

    Attributes:
        rows: Directions of the classes ``(n_t, width)`` of each task t, in task order.
        scale: σ, one learned number; 1 at first, carried on from task to task and never reset.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.rows = nn.ParameterList()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, features: Tensor, first: int = 0, channels: Sequence[int] | None = None) -> Tensor:
        """Scaled cosines ``(N, K)``; see :meth:`cosines`."""
        return self.scale * self.cosines(features, first, channels)

    def cosines(self, features: Tensor, first: int = 0, channels: Sequence[int] | None = None) -> Tensor:
        """Raw cosines s ``(N, K)`` between features ``(N, width)`` and the rows of ``rows[first:]``.

        In the precision of the rows also under autocast: half precision would blur cosines by up to 0.004.

        Args:
            features: Of any length, also 0 (all cosines are then 0).
            first: First task whose classes take part; negative counts from the end, as in a slice.
            channels: Compute these channels only, in this order; positions among those of ``rows[first:]``.
        """
        chosen = list(self.rows)[first:]
        if not chosen:
            return features.new_zeros(features.shape[0], 0)
        with torch.autocast(features.device.type, enabled=False):
            rows = chosen[0] if len(chosen) == 1 else torch.cat(chosen)
            if channels is not None:
                rows = rows[list(channels)]
            unit = F.normalize(features.to(rows.dtype), dim=1, eps=EPS)
            return F.linear(unit, F.normalize(rows, dim=1, eps=EPS))

    def grow(self, classes: int) -> None:
        """Append rows for ``classes`` new classes, uniform in ±1/√width; the earlier ones are not changed.

        They are drawn on the CPU, so that a seed gives the same values on every device.
        """
        if classes < 1:
            raise ValueError(f"a classifier needs at least one class, not {classes}")
        bound = self.width**-0.5
        rows = torch.empty(classes, self.width, dtype=torch.float32, device="cpu").uniform_(-bound, bound)
        self.rows.append(nn.Parameter(rows.to(device=self.scale.device, dtype=self.scale.dtype)))

    @torch.no_grad()
    def imprint(self, directions: Tensor) -> None:
        """Set the newest rows to given directions, as long as old rows are on average (spec CCSI 2.4).

        At the first task, where there are no old rows, as long as its own rows were. The length does not change
        a logit, only how fast a row turns.

        Args:
            directions: Mean feature direction e_c ``(n_t, width)`` of each class of the newest task, of any length
                but 0.

        Raises:
            PerdureError: A direction has length 0 or is not finite: the network gives that class no features.
        """
        if not self.rows:
            raise ValueError("there are no rows yet: grow the head first")
        rows = list(self.rows)
        newest = rows[-1]
        if directions.shape != newest.shape:
            raise ValueError(f"directions {tuple(directions.shape)} do not fit rows {tuple(newest.shape)}")
        directions = directions.to(newest)
        lengths = directions.norm(dim=1)
        bad = (~lengths.isfinite() | (lengths <= EPS)).nonzero().flatten().tolist()
        if bad:
            raise PerdureError(
                f"the network gives class {bad[0] + 1} of the task's {len(lengths)} no usable features to start from",
                "its training has failed: start a new run with a lower training.lr",
            )
        length = torch.cat([row.norm(dim=1) for row in rows[:-1] or rows]).mean()
        newest.copy_(F.normalize(directions, dim=1, eps=EPS) * length)


class Classifier(GrowingNetwork[Tensor]):
    """A body that makes one feature vector per image, and a cosine head on top of it.

    Args:
        body: Image ``(N, C, H, W)`` -> features ``(N, width)``.
        width: Length of the features.
        in_channels: Channels of the input, checked where given.
        sides: Sides in pixels of the square images that the body turns into features of this width; any image if
            not given.
        least_batch: Fewest images that it can train on at once.
        weights: What the body was initialised with; random if not given.

    Attributes:
        head: Class directions and scale.
    """

    kind: ClassVar[Kind] = "classification"

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
        super().__init__(body, width, 2, in_channels=in_channels, least_batch=least_batch, weights=weights)
        self.head = CosineHead(width)
        self.sides = sides

    def check_size(self, size: Sequence[int]) -> None:
        """Raise UsageError unless images of ``size`` (height and width in pixels) give features of the width."""
        super().check_size(size)
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

    def classify(self, features: Tensor, first: int = 0, channels: Sequence[int] | None = None) -> Tensor:
        """Logits ``(N, K)``, the cosines times the scale; see :meth:`CosineHead.cosines`."""
        logits: Tensor = self.head(features, first, channels)
        return logits

    def grow(self, classes: int) -> None:
        """Append rows for ``classes`` new classes; see :meth:`CosineHead.grow`."""
        self.head.grow(classes)

    def imprint(self, directions: Tensor) -> None:
        """Set the newest rows to directions ``(n_t, width)``; see :meth:`CosineHead.imprint`."""
        self.head.imprint(directions)

    def classifier_parameters(self) -> list[list[nn.Parameter]]:
        """The rows of each task. The scale belongs to all of them and goes on learning (spec CCSI 4.5)."""
        return [[rows] for rows in self.head.rows]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by part, as in every growing network, and ``scale``."""
        return {**super().parameter_groups(), "scale": [p for p in [self.head.scale] if p.requires_grad]}
