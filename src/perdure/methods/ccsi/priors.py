"""Image priors of class impressions: total variation over four directions, and the norm of the images.

All priors take ``groups``: the images are cut into that many equal groups in order, and each group gets a value of
its own. ``groups=1`` is the published form, one value for the batch; ``groups=len(images)`` one value an image.
Values of one group do not depend on the others, so many groups can be optimised in one tensor.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

Directions = tuple[Tensor, Tensor, Tensor, Tensor]


_FIRST: Final = slice(None, -1)
_LAST: Final = slice(1, None)
_ALL: Final = slice(None)
_NEIGHBOURS: Final = (
    ((..., _ALL, _LAST), (..., _ALL, _FIRST)),
    ((..., _LAST, _ALL), (..., _FIRST, _ALL)),
    ((..., _LAST, _LAST), (..., _FIRST, _FIRST)),
    ((..., _LAST, _FIRST), (..., _FIRST, _LAST)),
)
"""The pixels of each direction, and the neighbours that are subtracted from them."""


def differences(images: Tensor) -> Directions:
    """Differences of neighbours: along a row, along a column, and along both diagonals.

    Args:
        images: ``(N, C, H, W)`` of at least 2 × 2 pixels.

    Returns:
        ``(N, C, H, W-1)``, ``(N, C, H-1, W)`` and twice ``(N, C, H-1, W-1)``.
    """
    row, column, main, other = (images[here] - images[there] for here, there in _NEIGHBOURS)
    return row, column, main, other


def tv1(images: Tensor, groups: int = 1) -> Tensor:
    """TV₁ of every group: sum over the four directions of the mean absolute difference (spec 3.3).

    Args:
        images: ``(groups * B, C, H, W)``.
        groups: Number of groups.

    Returns:
        ``(groups,)``, in the unit of the images; does not grow with their number or size.
    """
    means = [_split(part.abs(), groups).mean((1, 2, 3, 4)) for part in differences(images)]
    return torch.stack(means).sum(0)


def tv2(images: Tensor, groups: int = 1) -> Tensor:
    """TV₂ of every group: sum over the four directions of the Frobenius norm of the differences (spec 3.3).

    The norm is over all images of the group together and not squared, so it grows with √B and with the side of the
    images; its weight belongs to a group size. The gradient is 0 where all differences of a direction vanish.

    Args:
        images: ``(groups * B, C, H, W)``.
        groups: Number of groups.

    Returns:
        ``(groups,)``, in the unit of the images.
    """
    value: Tensor = _Tv2.apply(images, groups)
    return value


def l2(images: Tensor, groups: int = 1) -> Tensor:
    """Norm of the images: mean over the images of a group of ‖x‖₂, not squared (spec 3.3).

    Args:
        images: ``(groups * B, C, H, W)``.
        groups: Number of groups.

    Returns:
        ``(groups,)``, in the unit of the images.
    """
    norms: Tensor = torch.linalg.vector_norm(images, dim=(1, 2, 3))
    return norms.view(groups, -1).mean(1)


def _split(images: Tensor, groups: int) -> Tensor:
    return images.reshape(groups, -1, *images.shape[1:])


class _Tv2(torch.autograd.Function):
    """Its gradient is gathered in one image; autograd would fill one with zeros for each of eight shifted views."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, groups: int) -> Tensor:
        parts = differences(images)
        norms = [torch.linalg.vector_norm(_split(part, groups), dim=(1, 2, 3, 4)) for part in parts]
        ctx.save_for_backward(*parts, *norms)
        return torch.stack(norms).sum(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        parts, norms = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        count = parts[0].shape[0]
        gathered = parts[0].new_zeros(*parts[0].shape[:3], parts[1].shape[3])
        for part, norm, (here, there) in zip(parts, norms, _NEIGHBOURS, strict=True):
            slope = torch.where(norm > 0, grads[0] / norm, 0).repeat_interleave(count // len(norm))
            share = part * slope.view(-1, 1, 1, 1)
            gathered[here].add_(share)
            gathered[there].sub_(share)
        return gathered, None
