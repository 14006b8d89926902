"""Stand-ins for the layers of a frozen network: normalisation that tells what it sees, convolutions in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from perdure.networks.continual_norm import ContinualNorm


class NormStatsHook(nn.Module):
    """A normalisation layer in evaluation mode that remembers the moments of its last input.

    Args:
        norm: The layer that it stands for.
    """

    running_mean: Tensor
    running_var: Tensor
    scale: Tensor
    shift: Tensor
    spread: Tensor

    def __init__(self, norm: _BatchNorm | ContinualNorm) -> None:
        super().__init__()
        batch = norm.batch if isinstance(norm, ContinualNorm) else norm
        assert batch.running_mean is not None
        assert batch.running_var is not None
        self.groups = norm.groups if isinstance(norm, ContinualNorm) else 0
        self.eps = norm.eps
        self.channels = batch.num_features
        scale = torch.rsqrt(batch.running_var + batch.eps)
        shift = torch.zeros_like(scale)
        if batch.affine:
            scale, shift = scale * batch.weight.detach(), batch.bias.detach()
        self.register_buffer("running_mean", batch.running_mean.clone())
        self.register_buffer("running_var", batch.running_var.clone())
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift - batch.running_mean * scale)
        spread = torch.eye(self.groups, dtype=scale.dtype, device=scale.device)
        self.register_buffer("spread", spread.repeat_interleave(self.channels // max(1, self.groups), 1))
        self._moments: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` -> the same shape."""
        y: Tensor
        y, *moments = _NormWithMoments.apply(x, self.scale, self.shift, self.spread, self.eps)
        self._moments = moments[0], moments[1]
        return y

    def take(self) -> tuple[Tensor, Tensor]:
        """Mean and mean square ``(N, C)`` of the last input; forgets them."""
        assert self._moments is not None, "a normalisation layer of the network was not used"
        moments, self._moments = self._moments, None
        return moments


class HalfConv(nn.Module):
    """A convolution whose products are taken in bfloat16; maps before and after it stay in float32.

    Args:
        conv: The layer that it stands for; without padding modes other than zeros.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.register_buffer("weight", conv.weight.detach().bfloat16())
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().bfloat16())
        self.stride, self.dilation, self.groups = conv.stride, conv.dilation, conv.groups
        self.padding = conv.padding

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` -> the map of the convolution."""
        half = F.conv2d(x.bfloat16(), self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return half.float()


def tap_norms(network: nn.Module) -> list[NormStatsHook]:
    """Put a :class:`NormStatsHook` in the place of every BatchNorm and ContinualNorm; returns them in module order.

    Layers that share their statistics between processes count too: in evaluation mode they are like any other.
    """
    _replace(network, lambda part: isinstance(part, (ContinualNorm, _BatchNorm)), NormStatsHook)
    return [part for part in network.modules() if isinstance(part, NormStatsHook)]


def halve_convolutions(network: nn.Module) -> None:
    """Put a :class:`HalfConv` in the place of every convolution of a float32 network."""
    _replace(network, lambda part: type(part) is nn.Conv2d and part.padding_mode == "zeros", HalfConv)


def keep_order(network: nn.Module) -> None:
    """Let gradients enter average pooling with channels innermost, as its maps are.

    Behind a pooling layer mostly comes ``flatten``, whose gradient has channels outermost; the backward pass of the
    pooling would then reorder the whole map instead of its few cells, which costs ten times as much.
    """

    def sort(_: nn.Module, __: Any, pooled: Tensor) -> None:
        if pooled.requires_grad:
            pooled.register_hook(_channels_innermost)  # type: ignore[no-untyped-call]

    for part in network.modules():
        if isinstance(part, nn.AvgPool2d):
            part.register_forward_hook(sort)


def _channels_innermost(gradient: Tensor) -> Tensor:
    return gradient.contiguous(memory_format=torch.channels_last)


def _replace(network: nn.Module, wanted: Callable[[nn.Module], bool], make: Callable[[Any], nn.Module]) -> None:
    """Replace every wanted part, but none inside another wanted part."""
    for name, part in network.named_children():
        if wanted(part):
            setattr(network, name, make(part))
        else:
            _replace(part, wanted, make)


class _NormWithMoments(torch.autograd.Function):
    """Normalisation in evaluation mode, and the moments of its input, with few passes over the map each way.

    y = a x + b with a and b an image and channel, which follow from the mean and the mean square of x; so the
    gradient of x is ``a·gy + (g_mean + 2 x·g_square) / HW``, where g_mean and g_square take up what flows back
    through a and b.
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
