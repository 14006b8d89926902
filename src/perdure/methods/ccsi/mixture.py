"""What an update draws from: new images, and those that stand for old classes (spec CCSI 4.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from perdure.data.dataset import Dataset, Joined
from perdure.data.tensors import tensor_view
from perdure.engine.phases import Batches
from perdure.methods.ccsi.options import CcsiOptions


def first_batches(new: Dataset, options: CcsiOptions, size: int) -> Batches:
    """Batches of ``size`` new images alone; with ``replacement`` (published) some come twice an epoch, some never."""
    weights = torch.ones(len(new)) if options.replacement else None
    return Batches(new, size, drop_last=False, weights=weights)


def mixed_batches(
    new: Dataset, images: Tensor, channels: Tensor, class_ids: Sequence[int], options: CcsiOptions, size: int
) -> Batches:
    """Batches of ``size`` in which replayed images have the wanted share, drawn with replacement.

    Args:
        new: Images of the task.
        images: ``(n, C, H, W)``, those that stand for old classes.
        channels: Channel of each ``(n,)``.
        class_ids: Class of each channel.
        options: ``share`` r and ``balance``; without the sampler in it every image comes once an epoch.
        size: Images a batch.
    """
    ids = torch.as_tensor(class_ids, dtype=torch.int16)[channels.cpu()]
    replayed = tensor_view(images, ids, new.source.space)
    both = Joined((new, replayed))
    if "sampler" not in options.balance:
        return Batches(both, size, drop_last=False)
    weight = len(new) * options.share / (len(replayed) * (1 - options.share))
    weights = torch.cat([torch.ones(len(new)), torch.full((len(replayed),), weight)])
    return Batches(both, size, drop_last=False, weights=weights, draws=int(len(new) / (1 - options.share)))
