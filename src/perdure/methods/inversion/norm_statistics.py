"""Normalisation statistics of a frozen network: what its normalisation layers receive, as differentiable moments.

A :class:`Probe` is a frozen copy of a classifier. Besides logits and features it returns, per image and channel, the
mean and the mean square of the input of every normalisation layer. All moments that class impressions are matched by
follow from these two tables: those of groups of images (which running statistics describe), those behind the group
normalisation of a ``ContinualNorm``, and those of its groups of channels.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from perdure.errors import PerdureError
from perdure.networks.classifier import Classifier
from perdure.networks.continual_norm import ContinualNorm


class InputMoments(NamedTuple):
    """Mean of x over the map ``(N, ΣC)``, and mean of x² ``(N, ΣC)``; x: inputs of all layers, in module order."""

    mean: Tensor
    square: Tensor


class NormStatsHook(nn.Module):
    """Stands in for a normalisation layer in evaluation mode and remembers the moments of its last input.

    Args:
        norm: The layer, a BatchNorm or a ContinualNorm.

    Attributes:
        spread: Which channels belong to which group of a ContinualNorm ``(groups, C)``, 0 or 1; (0, C) for BatchNorm.
    """

    def __init__(self, norm: _BatchNorm | ContinualNorm) -> None:
        super().__init__()
        batch = norm.batch if isinstance(norm, ContinualNorm) else norm
        assert batch.running_mean is not None
        assert batch.running_var is not None
        self.eps = norm.eps
        self.running_mean, self.running_var = batch.running_mean.clone(), batch.running_var.clone()
        self.scale = torch.rsqrt(batch.running_var + batch.eps)
        self.shift = -batch.running_mean * self.scale
        if batch.affine:
            self.scale = self.scale * batch.weight.detach()
            self.shift = batch.bias.detach() - batch.running_mean * self.scale
        groups = norm.groups if isinstance(norm, ContinualNorm) else 0
        spread = torch.eye(groups, dtype=self.scale.dtype, device=self.scale.device)
        self.spread = spread.repeat_interleave(batch.num_features // max(1, groups), 1)
        if not groups:
            self.spread = self.scale.new_zeros(0, batch.num_features)
        self._moments: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` -> the same shape."""
        y, *moments = _NormWithMoments.apply(x, self.scale, self.shift, self.spread, self.eps)
        self._moments = moments[0], moments[1]
        return y  # type: ignore[no-any-return]

    def take(self) -> tuple[Tensor, Tensor]:
        """Mean and mean square ``(N, C)`` of the last input; forgets them, and with them their graph."""
        assert self._moments is not None, "a normalisation layer of the network was not used"
        moments, self._moments = self._moments, None
        return moments


class Probe:
    """A frozen copy of a classifier that reports moments; gradients reach the images only.

    Args:
        network: Copied; the original is left as it is.
        bf16: Take the products of convolutions in bfloat16. All else stays as precise as the network is.

    Attributes:
        running_mean: What BatchNorm layers store of their inputs, all layers side by side: ``(ΣC,)``.
        running_var: Likewise.
        layers: Number of normalisation layers.
        channel_layers: Layer of each of their channels ``(ΣC,)``.
        group_layers: Layer of each group of channels, all ``ContinualNorm`` layers together ``(groups,)``.
        groups: Their number; 0 without such layers.

    Raises:
        PerdureError: The network has no BatchNorm, or has numbers that are not finite.
    """

    def __init__(self, network: Classifier, bf16: bool = False) -> None:
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            if not torch.isfinite(tensor).all():
                raise PerdureError(
                    f"the old network is broken: '{name}' has numbers that are not finite",
                    "train the earlier task again with a smaller learning rate (training.lr)",
                )
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._hooks = hooks = hook_norms(self.network)
        if not hooks:
            raise PerdureError(
                "the network has no batch normalisation, so its weights say nothing about the images it has seen",
                "use a network with BatchNorm or Continual Normalization, such as cosine_resnet",
            )
        for part in self.network.modules():
            if isinstance(part, nn.AvgPool2d):
                part.register_forward_hook(_sort_gradient)
            if isinstance(part, nn.Conv2d) and bf16:  # no autocast: the moments between convolutions stay in float32
                part.bfloat16()
                part.register_forward_pre_hook(lambda _, given: (given[0].bfloat16(),))
                part.register_forward_hook(lambda _, __, found: found.float())
        self.network.to(memory_format=torch.channels_last)
        self.layers = len(hooks)
        device = hooks[0].running_mean.device
        numbers = torch.arange(self.layers, device=device)
        groups = torch.tensor([len(hook.spread) for hook in hooks], device=device)
        self.running_mean = torch.cat([hook.running_mean for hook in hooks])
        self.running_var = torch.cat([hook.running_var for hook in hooks])
        self.group_layers, self.groups = numbers.repeat_interleave(groups), int(groups.sum())
        channels = torch.tensor([len(hook.running_mean) for hook in hooks], device=device)
        self.channel_layers = numbers.repeat_interleave(channels)
        # Products with these tables stand for sums over the groups of all layers at once.
        self._spread: Tensor = torch.block_diag(*[hook.spread for hook in hooks])  # type: ignore[no-untyped-call]
        self._pool = (self._spread / self._spread.sum(1, keepdim=True)).t().contiguous()
        self._plain = 1 - self._spread.sum(0)
        self._eps = torch.cat([torch.full_like(hook.spread[:, 0], hook.eps) for hook in hooks])

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor, InputMoments]:
        """Logits ``(N, K)``, features ``(N, width)`` and moments for images ``(N, C, H, W)``."""
        features = self.network.features(images.contiguous(memory_format=torch.channels_last))
        means, squares = zip(*(hook.take() for hook in self._hooks), strict=True)
        return self.network.classify(features), features, InputMoments(torch.cat(means, 1), torch.cat(squares, 1))

    def channel_groups(self, found: InputMoments) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of x in each group of channels of every image: ``(N, groups)`` each."""
        mean = found.mean @ self._pool
        return mean, (found.square @ self._pool - mean.square()).clamp_min(0)

    def batch_moments(self, found: InputMoments, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and biased variance ``(groups, ΣC)``, over groups of images, of what running statistics describe.

        That is x for BatchNorm, and x after group normalisation for a ``ContinualNorm``.
        """
        mean, square = found
        if self.groups:
            centre, var = self.channel_groups(found)
            scale = torch.rsqrt(var + self._eps) @ self._spread + self._plain
            shift = centre @ self._spread
            square = scale.square() * (square - 2 * shift * mean + shift.square())
            mean = scale * (mean - shift)
        mean = mean.reshape(groups, -1, mean.shape[1]).mean(1)
        square = square.reshape(groups, -1, square.shape[1]).mean(1)
        return mean, (square - mean.square()).clamp_min(0)


def segment_norms(values: Tensor, index: Tensor, count: int) -> Tensor:
    """Euclidean norm of the parts of the last axis: ``(..., M)`` and its part numbers ``(M,)`` -> ``(..., count)``.

    The gradient of a norm of 0 is 0.
    """
    sums = values.new_zeros((*values.shape[:-1], count)).index_add(-1, index, values.square())
    return torch.where(sums > 0, sums, 1).sqrt() * (sums > 0)


def hook_norms(network: nn.Module) -> list[NormStatsHook]:
    """Put a :class:`NormStatsHook` in the place of every BatchNorm and ContinualNorm; returns them in module order.

    Layers that share their statistics between processes count too: in evaluation mode they are like any other.
    """
    hooks = []
    for name, part in network.named_children():
        if isinstance(part, (ContinualNorm, _BatchNorm)):
            hooks.append(NormStatsHook(part))
            setattr(network, name, hooks[-1])
        else:
            hooks += hook_norms(part)
    return hooks


def _sort_gradient(_: nn.Module, __: tuple[Tensor, ...], pooled: Tensor) -> None:
    """Let gradients enter average pooling with channels innermost, as its maps are.

    ``flatten`` behind it returns them with channels outermost, and the backward pass of the pooling would reorder the
    whole map instead of its few cells: 95 instead of 91 ms per step of two groups with bf16 products.
    """
    if pooled.requires_grad:
        pooled.register_hook(partial(torch.Tensor.contiguous, memory_format=torch.channels_last))  # type: ignore[no-untyped-call]


class _NormWithMoments(torch.autograd.Function):
    """Normalisation in evaluation mode, and the moments of its input, with few passes over the map each way.

    y = a x + b with a and b per image and channel, which follow from the mean and the mean square of x; so the
    gradient of x is ``a·gy + (g_mean + 2 x·g_square) / HW``, where g_mean and g_square take up what flows back
    through a and b.

    Written by hand because the passes over the maps dominate (benchmarks/README.md, class impressions): the same
    formula under autograd makes the step of two groups 1.5 times as long (117 -> 175 ms; bf16 94 -> 154 ms), and
    hooks on the plain layers 1.8 times (210 ms).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, spread: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        size = x.shape[2] * x.shape[3]
        mean, square = x.sum((2, 3)).div_(size), (x * x).sum((2, 3)).div_(size)
        if len(spread):  # products with small matrices stand for sums over groups of channels
            pool = spread.t() * (len(spread) / x.shape[1])
            centre = mean @ pool
            var = torch.addcmul(square @ pool, centre, centre, value=-1)
            rate = var.clamp_min_(0).add_(eps).rsqrt_()
            a = (rate @ spread).mul_(scale)
            b = torch.addcmul(shift, a, centre @ spread, value=-1)
            ctx.save_for_backward(x, a, scale, spread, centre, rate)
        else:
            a, b = scale[None], shift[None]
            ctx.save_for_backward(x, a)
        return torch.addcmul(b[..., None, None], x, a[..., None, None]), mean, square

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gy, g_mean, g_square = grads
        x, a, *saved = ctx.saved_tensors
        size = x.shape[2] * x.shape[3]
        if saved:
            scale, spread, centre, rate = saved
            pool = (spread * scale).t()
            ga, gb = (gy * x).sum((2, 3)) @ pool, gy.sum((2, 3)) @ pool
            # a = scale·rate, b = shift - a·centre, rate = (var + eps)^-1/2, var = mean square - centre²
            share = len(spread) / x.shape[1]
            g_var = (rate * rate * rate).mul_(torch.addcmul(ga, gb, centre, value=-1)).mul_(-0.5 * share)
            g_centre = (gb * rate).mul_(-share).addcmul_(centre, g_var, value=-2)
            g_mean, g_square = torch.addmm(g_mean, g_centre, spread), torch.addmm(g_square, g_var, spread)
        gx = torch.addcmul((g_mean / size)[..., None, None], x, (g_square * (2 / size))[..., None, None])
        return gx.addcmul_(gy, a[..., None, None]), None, None, None, None
