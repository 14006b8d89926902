"""A head of cosines that grows: one matrix of class directions a task, one shared scale (spec CCSI 2.2, 2.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.errors import PerdureError

EPS = 1e-12


class CosineHead(nn.Module):
    """Logits ℓ_k = σ cos(f, w_k), without bias.

    With one task this is the published single head, with more the published split head (old and new rows under one
    scale): both compute the same, for a row does not depend on the others.

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

    def forward(self, features: Tensor, first: int = 0) -> Tensor:
        """Scaled cosines ``(N, K)``; see :meth:`cosines`."""
        return self.scale * self.cosines(features, first)

    def cosines(self, features: Tensor, first: int = 0) -> Tensor:
        """Raw cosines s ``(N, K)`` between features ``(N, width)`` and the rows of ``rows[first:]``.

        In the precision of the rows also under autocast: half precision would blur cosines by up to 0.004.

        Args:
            features: Of any length, also 0 (all cosines are then 0).
            first: First task whose classes take part; negative counts from the end, as in a slice.
        """
        chosen = list(self.rows)[first:]
        if not chosen:
            return features.new_zeros(features.shape[0], 0)
        with torch.autocast(features.device.type, enabled=False):
            rows = chosen[0] if len(chosen) == 1 else torch.cat(chosen)
            unit = F.normalize(features.to(rows.dtype), dim=1, eps=EPS)
            return F.linear(unit, F.normalize(rows, dim=1, eps=EPS))

    def grow(self, classes: int) -> None:
        """Append rows for ``classes`` new classes, uniform in ±1/√width; the earlier ones are not touched.

        They are drawn on the CPU, so that the same seed gives the same values on every device.
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
