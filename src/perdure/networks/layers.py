"""Small parts that networks share: initialisation, frozen normalisation, normalisation over processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

TRANSPOSED = (nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, *TRANSPOSED)
# Also finds timm's normalisations (with a built-in activation), which inherit from these.
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def init_kaiming(module: nn.Module, fan: Literal["fan_in", "fan_out"] = "fan_in") -> None:
    """Draw all convolutions from the Kaiming normal distribution (gain √2); normalisation 1/0, biases 0.

    A transposed convolution counts its input channels only: where kernel and stride agree, one tap per channel
    reaches each output cell.

    Args:
        module: Initialised in place.
        fan: What the variance of other convolutions is divided by: taps that reach an output cell, or that an input
            cell reaches.
    """
    for part in module.modules():
        if not isinstance(part, CONVOLUTIONS + NORMS):
            continue
        for name, parameter in part.named_parameters(recurse=False):  # none in a norm without scale and shift
            if name == "bias":
                nn.init.zeros_(parameter)
            elif isinstance(part, NORMS):
                nn.init.ones_(parameter)
            elif isinstance(part, TRANSPOSED):
                nn.init.normal_(parameter, std=(2.0 / part.in_channels) ** 0.5)
            else:
                nn.init.kaiming_normal_(parameter, mode=fan, nonlinearity="relu")


def freeze_affine(module: nn.Module) -> None:
    """Take scale and shift of every normalisation layer out of training; their gradients are dropped."""
    for part in module.modules():
        for parameter in part.parameters(recurse=False) if isinstance(part, NORMS) else ():
            parameter.requires_grad_(False)
            parameter.grad = None  # an optimiser that holds it already would apply it again


def hold_norm(module: nn.Module) -> None:
    """Put every normalisation layer into evaluation mode, whatever mode the module is in."""
    for part in module.modules():
        if isinstance(part, NORMS):
            part.training = False


def hold_frozen_norms(module: nn.Module) -> None:
    """Put normalisation layers that have parameters, none of which is trained, into evaluation mode."""
    for part in module.modules():
        own = list(part.parameters(recurse=False)) if isinstance(part, NORMS) else []
        if own and not any(parameter.requires_grad for parameter in own):
            part.training = False


def hold_dropout(module: nn.Module) -> None:
    """Put every kind of dropout into evaluation mode, whatever mode the module is in."""
    for part in module.modules():
        # timm's stochastic depth and block dropout share no class with torch's dropout, but this attribute; attention
        # drops its weights by a number, without a layer of its own.
        if isinstance(part, (nn.modules.dropout._DropoutNd, nn.MultiheadAttention)) or hasattr(part, "drop_prob"):
            part.training = False


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """All BatchNorm layers of a module in module order, also synchronised ones and those inside a ContinualNorm.

    What a layer's running statistics describe is its input.
    """
    return [part for part in module.modules() if isinstance(part, _BatchNorm)]


@contextmanager
def without_updates(module: nn.Module) -> Iterator[None]:
    """Forward passes inside leave every BatchNorm and ContinualNorm as it is, to the last bit.

    In train mode they still normalise by the moments of their batch; running statistics, counters and group
    statistics do not move. For a second pass over other data in one step (spec CCSI 7.2, J4).
    """
    # Not by evaluation mode, which would normalise by the running statistics, nor by momentum 0, which counts batches.
    layers = batch_norms(module)
    before = [layer.track_running_stats for layer in layers]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer, tracked in zip(layers, before, strict=True):
            layer.track_running_stats = tracked


def sync_batch_norm(module: nn.Module, device: torch.device | str | None = None) -> nn.Module:
    """Share BatchNorm statistics between processes where that is possible: several processes, each on a GPU.

    SyncBatchNorm raises on a CPU, so there, and in a single process, the module comes back as it is.
    Parameters stay the same objects: frozen ones stay frozen and optimisers stay valid.

    Args:
        module: Converted in place, unless it is itself a BatchNorm.
        device: Where the module will run; by default, where its first parameter is now.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return module
    first = next(module.parameters(), None)
    place = torch.device(device) if device is not None else first.device if first is not None else None
    if place is None or place.type != "cuda":
        return module
    from timm.layers import convert_sync_batchnorm  # torch's own drops the activation in timm's BatchNormAct

    converted: nn.Module = convert_sync_batchnorm(module)
    return converted
