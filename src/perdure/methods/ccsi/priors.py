"""Image priors of class impressions: total variation over four directions, and the norm of the images.

All priors take ``groups``: the images are cut into that many equal groups in order, and each group gets a value of
its own. ``groups=1`` is the published form, one value for the batch; ``groups=len(images)`` one value an image.
Values of one group do not depend on the others, so many groups can be optimised in one tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

Directions = tuple[Tensor, Tensor, Tensor, Tensor]


def differences(images: Tensor) -> Directions:
    """Differences of neighbours: along a row, along a column, and along both diagonals.

    Args:
        images: ``(N, C, H, W)`` of at least 2 × 2 pixels.

    Returns:
        ``(N, C, H, W-1)``, ``(N, C, H-1, W)`` and twice ``(N, C, H-1, W-1)``.
    """
    return (
        images[..., :, 1:] - images[..., :, :-1],
        images[..., 1:, :] - images[..., :-1, :],
        images[..., 1:, 1:] - images[..., :-1, :-1],
        images[..., 1:, :-1] - images[..., :-1, 1:],
    )


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
    norms = [torch.linalg.vector_norm(_split(part, groups), dim=(1, 2, 3, 4)) for part in differences(images)]
    return torch.stack(norms).sum(0)


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
