"""Cutting large inputs into overlapping windows and averaging the scores."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def starts(length: int, size: int, stride: int) -> list[int]:
    """First positions of windows along one axis; the last window is moved back so that it ends at the border.

    Windows stand ``stride`` apart until the axis is covered: ``length`` 683, ``size`` 512, ``stride`` 341 gives
    0 and 171. An axis shorter than ``size`` gives one window at 0.
    """
    count = -(-max(length - size, 0) // stride) + 1
    return [max(0, min(k * stride, length - size)) for k in range(count)]


def averaged(score: Callable[[Tensor], Tensor], image: Tensor, size: int, overlap: float = 1 / 3) -> Tensor:
    """Scores of an image ``(1, C, *S)`` from windows of side ``size``, averaged where windows overlap.

    Args:
        score: Window ``(1, C, *s)`` -> scores ``(1, K, *s)`` whose average makes sense.
        image: The whole image.
        size: Side of a window.
        overlap: Share of a window that its neighbour covers again.

    Returns:
        ``(1, K, *S)``.
    """
    shape = image.shape[2:]
    if all(length <= size for length in shape):
        return score(image)
    stride = max(1, round(size * (1 - overlap)))
    total: Tensor | None = None
    visits = torch.zeros(1, 1, *shape, device=image.device)
    for corner in itertools.product(*(starts(length, size, stride) for length in shape)):
        window = _window(corner, size)
        scores = score(image[window])
        if total is None:
            total = torch.zeros(1, scores.shape[1], *shape, device=image.device)
        total[window] += scores
        visits[window] += 1
    assert total is not None  # there is at least one window
    return total / visits


def _window(corner: Sequence[int], size: int) -> tuple[slice, ...]:
    return (slice(None), slice(None), *(slice(at, at + size) for at in corner))
