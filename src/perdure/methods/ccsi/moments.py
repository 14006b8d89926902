"""Moments inside a frozen network: what its normalisation layers see, in one pass over each map.

A :class:`Probe` is a frozen copy of a network. Its forward pass returns, besides logits and features, the mean and
the mean square of the input of every normalisation layer, an image and a channel each. All moments of the method
follow from these two small tables: those of whole groups of images (that running statistics describe), those after
the group normalisation of a ``ContinualNorm``, and those of its groups of channels.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from perdure.errors import PerdureError
from perdure.networks.classifier import Classifier
from perdure.networks.continual_norm import ContinualNorm


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
        dtype: Of the copy's body. Moments and the head stay in float32 (float64 for a float64 network).

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

    def __init__(self, network: Classifier, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        check_finite(network)
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._taps = _replace_norms(self.network)
        if not self._taps:
            raise PerdureError(
                "the network has no batch normalisation, so its weights say nothing about the images it has seen",
                "use a network with BatchNorm or Continual Normalization, such as cosine_resnet",
            )
        if dtype != torch.float32:
            for name, part in self.network.named_children():
                if name != "head":
                    part.to(dtype)
        self.network.to(memory_format=torch.channels_last)
        self.dtype = dtype
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
        images = images.to(self.dtype, memory_format=torch.channels_last)
        features = self.network.features(images).to(self.running_mean.dtype)
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
        mean = mean.unflatten(0, (groups, -1)).mean(1)
        square = square.unflatten(0, (groups, -1)).mean(1)
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
                f"the old network is broken: '{name}' has numbers that are not finite, so no images can be made from it",
                "train the earlier task again with a smaller learning rate (training.lr)",
            )


class Tap(nn.Module):
    """A normalisation layer in evaluation mode that remembers the moments of its last input.

    Args:
        norm: The layer that it stands for.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: nn.BatchNorm2d | ContinualNorm) -> None:
        super().__init__()
        batch = norm.batch if isinstance(norm, ContinualNorm) else norm
        assert batch.running_mean is not None
        assert batch.running_var is not None
        self.groups = norm.groups if isinstance(norm, ContinualNorm) else 0
        self.eps = norm.eps
        self.channels = batch.num_features
        self.running_mean, self.running_var = batch.running_mean.clone(), batch.running_var.clone()
        scale = torch.rsqrt(self.running_var + batch.eps)
        if batch.affine:
            scale = scale * batch.weight.detach()
        shift = -self.running_mean * scale
        self.affine = (scale, shift + batch.bias.detach() if batch.affine else shift)
        self._moments: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` -> the same shape."""
        y, mean, square = _NormWithMoments.apply(x, *self.affine, self.groups, self.eps)
        self._moments = mean, square
        return y

    def take(self) -> tuple[Tensor, Tensor]:
        """Mean and mean square ``(N, C)`` of the last input; forgets them."""
        assert self._moments is not None, "a normalisation layer of the network was not used"
        moments, self._moments = self._moments, None
        return moments

    def _apply(self, fn: Any, recurse: bool = True) -> Tap:
        return self


def _replace_norms(network: nn.Module) -> list[Tap]:
    """Put a tap in the place of every normalisation layer; returns the taps in module order."""
    taps = []
    for parent in list(network.modules()):
        for name, part in parent.named_children():
            if isinstance(part, (ContinualNorm, nn.BatchNorm2d)) and not isinstance(parent, ContinualNorm):
                setattr(parent, name, Tap(part))
    for part in network.modules():
        if isinstance(part, Tap):
            taps.append(part)
    return taps


class _NormWithMoments(torch.autograd.Function):
    """Normalisation in evaluation mode, and the moments of its input, with few passes over the map each way."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        size, wide = x.shape[2] * x.shape[3], scale.dtype
        mean = x.sum((2, 3), dtype=wide) / size
        square = (x * x).sum((2, 3), dtype=wide) / size
        if groups:
            centre = mean.unflatten(1, (groups, -1)).mean(2, keepdim=True)
            var = square.unflatten(1, (groups, -1)).mean(2, keepdim=True) - centre.square()
            rate = torch.rsqrt(var.clamp_min(0) + eps)
            a = (scale.view(groups, -1) * rate).flatten(1)
            b = shift - (a.unflatten(1, (groups, -1)) * centre).flatten(1)
            ctx.save_for_backward(x, scale, a, centre, rate)
        else:
            a, b = scale[None], shift[None]
            ctx.save_for_backward(x, a)
        ctx.groups = groups
        return torch.addcmul(b.to(x.dtype)[..., None, None], x, a.to(x.dtype)[..., None, None]), mean, square

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gy, g_mean, g_square = grads
        x, *saved = ctx.saved_tensors
        size = x.shape[2] * x.shape[3]
        a = saved[0]
        if ctx.groups:
            scale, a, centre, rate = saved
            wide = scale.dtype
            ga = (gy * x).sum((2, 3), dtype=wide).unflatten(1, (ctx.groups, -1))
            gb = gy.sum((2, 3), dtype=wide).unflatten(1, (ctx.groups, -1))
            scale = scale.view(ctx.groups, -1)
            from_b = (gb * scale).sum(2, keepdim=True)
            g_rate = (ga * scale).sum(2, keepdim=True) - from_b * centre
            g_var = -0.5 * rate**3 * g_rate
            g_centre = -(from_b * rate) - 2 * centre * g_var
            g_mean = (g_mean.unflatten(1, (ctx.groups, -1)) + g_centre / scale.shape[1]).flatten(1)
            g_square = (g_square.unflatten(1, (ctx.groups, -1)) + g_var / scale.shape[1]).flatten(1)
        constant, slope = (g_mean / size).to(x.dtype)[..., None, None], (g_square * (2 / size)).to(x.dtype)[..., None, None]
        gx = torch.addcmul(constant, x, slope).addcmul_(gy, a.to(x.dtype)[..., None, None])
        return gx, None, None, None, None
