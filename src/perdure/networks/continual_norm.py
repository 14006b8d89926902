"""Continual Normalization: group normalisation of every image, then batch normalisation (spec CCSI 2.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.errors import UsageError

GROUP_BUFFERS: Final = ("group_mean", "group_var")


class ContinualNorm(nn.Module):
    """GroupNorm without scale and shift, then BatchNorm with them: u = GN(x), y = BN(u).

    Running statistics are those of u, in a ``BatchNorm2d`` of its own: freezing, finding and synchronising
    batch normalisation therefore works as in a network without groups. Maps may have any height and width, batches
    any size; a training batch with one value per channel (one image, 1x1 map) has no spread and is refused.

    Args:
        channels: Channels of the map.
        groups: Groups of channels that are normalised together; a divisor of ``channels``.
        momentum: Share of the newest batch in the running statistics. The published code has 1: the statistics
            are those of the last training batch alone.
        eps: Added to both variances.
        group_statistics: Keep the moments of every image of the last full training batch (the published, positional
            statistics, spec CCSI 2.3) in the buffers ``group_mean`` and ``group_var``.

    Attributes:
        batch: The BatchNorm. Its mode decides whether this layer trains.
        group_mean: Mean of x ``(B, groups)``, B the size of the first training batch ever seen; ``None`` before it.
            Later training batches of the same size overwrite it, others leave it alone.
        group_var: Variance (biased) of x ``(B, groups)``, likewise.

    Raises:
        UsageError: ``groups`` does not divide ``channels``, or the momentum is not above 0 and at most 1.
    """

    group_mean: Tensor | None
    group_var: Tensor | None

    def __init__(
        self,
        channels: int,
        groups: int = 4,
        momentum: float = 0.1,
        eps: float = 1e-5,
        *,
        group_statistics: bool = False,
    ) -> None:
        super().__init__()
        if groups < 1 or channels % groups:
            raise UsageError(
                f"{channels} channels cannot be normalised in {groups} groups", "give a divisor, such as norm_groups=4"
            )
        check_momentum(momentum)
        self.groups = groups
        self.eps = eps
        self.group_statistics = group_statistics
        self.batch = nn.BatchNorm2d(channels, eps, momentum)
        for name in GROUP_BUFFERS:
            self.register_buffer(name, None)  # a buffer without a value is not saved

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` -> the same shape.

        Raises:
            UsageError: A single value per channel, in train mode.
        """
        # SyncBatchNorm, which is no BatchNorm2d, has the values of other processes too.
        if self.batch.training and x.numel() == x.shape[1] and isinstance(self.batch, nn.BatchNorm2d):
            raise UsageError(
                "continual normalisation cannot train on one image whose map is a single cell",
                "use a batch size of at least 2 in every process, or larger images",
            )
        if (
            self.group_statistics
            and self.batch.training
            and self.batch.track_running_stats
            and (self.group_mean is None or self.group_mean.shape[0] == x.shape[0])
        ):
            with torch.no_grad():
                self.group_mean, self.group_var = self.group_moments(x)
        u = F.group_norm(x, self.groups, eps=self.eps)
        y: Tensor = self.batch(u)
        return y

    def group_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of x ``(N, C, H, W)`` over each group of channels: ``(N, groups)`` each.

        Differentiable; computed in single precision where x has less.
        """
        wide = x if x.dtype == torch.float64 else x.float()
        var, mean = torch.var_mean(wide.reshape(x.shape[0], self.groups, -1), dim=2, correction=0)
        return mean, var

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Take group statistics of whatever batch size, or none, as they were saved."""
        if self.group_statistics:
            for name in GROUP_BUFFERS:
                saved = state_dict.get(prefix + name)
                place = self.batch.weight.device
                setattr(self, name, None if saved is None else torch.empty_like(saved, device=place))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def check_momentum(momentum: float) -> None:
    """Raise UsageError unless running statistics can follow batches with this momentum."""
    if not 0 < momentum <= 1:
        raise UsageError(
            f"a normalisation momentum of {momentum:g} makes no sense", "give more than 0 and at most 1, such as 0.1"
        )


def continual_norms(module: nn.Module) -> list[ContinualNorm]:
    """All Continual Normalization layers of a module, in module order."""
    return [part for part in module.modules() if isinstance(part, ContinualNorm)]
