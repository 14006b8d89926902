"""Moments inside a frozen network: what its normalisation layers see, in one pass over each map.

A :class:`Probe` is a frozen copy of a network. Its forward pass returns, besides logits and features, the mean and
the mean square of the input of every normalisation layer, an image and a channel each. All moments of the method
follow from these two small tables: those of whole groups of images (that running statistics describe), those after
the group normalisation of a ``ContinualNorm``, and those of its groups of channels.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from perdure.errors import PerdureError
from perdure.methods.ccsi.taps import halve_convolutions, keep_order, tap_norms
from perdure.networks.classifier import Classifier


class Raw(NamedTuple):
    """Moments of the input x of all normalisation layers, side by side in module order.

    Args:
        mean: Mean of x over the map, ``(N, ΣC)`` float32.
        square: Mean of x², ``(N, ΣC)``.
    """

    mean: Tensor
    square: Tensor


class Answer(NamedTuple):
    """What a :class:`Probe` says of images: logits ``(N, K)``, features ``(N, width)``, and the raw moments."""

    logits: Tensor
    features: Tensor
    raw: Raw


class Probe(nn.Module):
    """A frozen copy of a classifier that reports moments; builds no gradients but those of the images.

    Args:
        network: Copied; the original is left as it is.
        bf16: Take the products of convolutions in bfloat16. All else stays as precise as the network is.

    Attributes:
        running_mean: What BatchNorm layers remember of their inputs, all layers side by side: ``(ΣC,)``.
        running_var: Likewise.
        layers: Number of normalisation layers.
        groups: Groups of channels of all ``ContinualNorm`` layers together; 0 without such layers.
        group_layers: Layer of each of these groups ``(groups,)``.

    Raises:
        PerdureError: The network has no BatchNorm, or has numbers that are not finite.
    """

    running_mean: Tensor
    running_var: Tensor
    group_layers: Tensor
    _layer_of: Tensor
    _pool: Tensor
    _spread: Tensor
    _plain: Tensor
    _eps: Tensor

    def __init__(self, network: Classifier, bf16: bool = False) -> None:
        super().__init__()
        check_finite(network)
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._taps = tap_norms(self.network)
        if not self._taps:
            raise PerdureError(
                "the network has no batch normalisation, so its weights say nothing about the images it has seen",
                "use a network with BatchNorm or Continual Normalization, such as cosine_resnet",
            )
        if bf16:
            halve_convolutions(self.network)
        keep_order(self.network)
        self.network.to(memory_format=torch.channels_last)
        self.layers = len(self._taps)
        self._index()

    def _index(self) -> None:
        """Tables that turn moments of channels into those of groups and layers, for all layers in one product."""
        taps = self._taps
        channels = [tap.channels for tap in taps]
        wide = taps[0].running_mean.dtype
        layer_of = torch.repeat_interleave(torch.arange(len(taps)), torch.tensor(channels))
        group_layers = [layer for layer, tap in enumerate(taps) for _ in range(tap.groups)]
        spread = torch.zeros(len(group_layers), sum(channels), dtype=wide)
        row = column = 0
        for tap in taps:
            for _ in range(tap.groups):
                spread[row, column : column + tap.channels // tap.groups] = 1
                row, column = row + 1, column + tap.channels // tap.groups
            column += 0 if tap.groups else tap.channels
        eps = [tap.eps for tap in taps for _ in range(tap.groups)]
        tables = {
            "running_mean": torch.cat([tap.running_mean for tap in taps]),
            "running_var": torch.cat([tap.running_var for tap in taps]),
            "group_layers": torch.tensor(group_layers, dtype=torch.int64),
            "_layer_of": layer_of,
            "_spread": spread,
            "_pool": (spread / spread.sum(1, keepdim=True)).t().contiguous(),
            "_plain": 1 - spread.sum(0),
            "_eps": torch.tensor(eps, dtype=wide),
        }
        device = taps[0].running_mean.device
        for name, table in tables.items():
            self.register_buffer(name, table.to(device), persistent=False)
        self.groups = len(group_layers)

    def forward(self, images: Tensor) -> Answer:
        """Answer for images ``(N, C, H, W)``."""
        features = self.network.features(images.contiguous(memory_format=torch.channels_last))
        means, squares = zip(*(tap.take() for tap in self._taps), strict=True)
        return Answer(self.network.classify(features), features, Raw(torch.cat(means, 1), torch.cat(squares, 1)))

    def channel_groups(self, raw: Raw) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of x in each group of channels of every image: ``(N, groups)`` each."""
        mean = raw.mean @ self._pool
        return mean, (raw.square @ self._pool - mean.square()).clamp_min(0)

    def batch_moments(self, raw: Raw, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and biased variance, over groups of images, of what running statistics describe.

        That is x for BatchNorm, and x after group normalisation for a ``ContinualNorm``.

        Args:
            raw: Of ``groups * B`` images.
            groups: Groups of images.

        Returns:
            ``(groups, ΣC)`` each.
        """
        mean, square = raw
        if self.groups:
            centre, var = self.channel_groups(raw)
            scale = torch.rsqrt(var + self._eps) @ self._spread + self._plain
            shift = centre @ self._spread
            square = scale.square() * (square - 2 * shift * mean + shift.square())
            mean = scale * (mean - shift)
        mean = mean.reshape(groups, -1, mean.shape[1]).mean(1)
        square = square.reshape(groups, -1, square.shape[1]).mean(1)
        return mean, (square - mean.square()).clamp_min(0)

    def layer_norms(self, values: Tensor) -> Tensor:
        """Euclidean norm over the channels of each layer: ``(..., ΣC)`` -> ``(..., layers)``."""
        return segment_norms(values, self._layer_of, self.layers)


def segment_norms(values: Tensor, index: Tensor, count: int) -> Tensor:
    """Euclidean norm of the parts of the last axis: ``(..., M)`` and its part numbers ``(M,)`` -> ``(..., count)``.

    The gradient of a norm of 0 is 0.
    """
    sums = values.new_zeros((*values.shape[:-1], count)).index_add(-1, index, values.square())
    return torch.where(sums > 0, sums, 1).sqrt() * (sums > 0)


def check_finite(network: nn.Module) -> None:
    """Raise PerdureError if a parameter or buffer holds NaN or infinity."""
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if not torch.isfinite(tensor).all():
            raise PerdureError(
                f"the old network is broken: '{name}' has numbers that are not finite",
                "train the earlier task again with a smaller learning rate (training.lr)",
            )


@torch.no_grad()
def class_moment_sums(network: Classifier, images: Tensor, codes: Tensor, classes: int) -> dict[str, Tensor]:
    """Sums, over the images of a batch, of the moments of groups of channels in all ContinualNorm layers (spec 3.5).

    Args:
        network: Is looked at in evaluation mode.
        images: ``(N, C, H, W)``.
        codes: Class of each ``(N,)`` int64 in 0..classes-1.
        classes: Number of classes n.

    Returns:
        ``moment_counts (n,)`` int64; ``moment_sums`` and ``moment_squares (n, groups, 2)`` float64, of group means
        and group variances. They add up over batches; see :func:`class_moments`.
    """
    probe = Probe(network)
    values = torch.stack(probe.channel_groups(probe(images).raw), 2).double()
    sums = values.new_zeros(classes, *values.shape[1:])
    return {
        "moment_counts": torch.bincount(codes, minlength=classes),
        "moment_sums": sums.index_add(0, codes, values),
        "moment_squares": sums.index_add(0, codes, values.square()),
    }


def class_moments(sums: dict[str, Tensor]) -> Tensor:
    """Moments of every class ``(n, groups, 4)`` float32 from the totals of :func:`class_moment_sums`.

    The last axis holds the mean of the group means, the mean of the group variances, and the standard deviation
    (biased) of either; all over the images of the class. 16 bytes a group: 576 bytes a class for the small network.
    """
    counts = sums["moment_counts"].clamp_min(1)[:, None, None]
    mean = sums["moment_sums"] / counts
    deviation = (sums["moment_squares"] / counts - mean.square()).clamp_min(0).sqrt()
    return torch.cat([mean, deviation], 2).float()
