"""Predicting a case: the only way from an image to labels. Evaluation, reports and `perdure predict` all go through it.

A prepared image is cut into windows, the windows are scored a few classes at a time, scores of overlapping windows are
averaged and brought back to the raw grid, and only the best class so far is kept. Memory depends on the size of the
image and not on the number of classes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from perdure.data.preparation import Preparation
from perdure.methods.prediction import Prediction

SCORES_AT_ONCE: Final = 1 << 26
"""Scores in memory at a time, over all images of a call: 256 MiB of float32, and as much again on the raw grid."""
HELD_BYTES: Final = 1 << 30
"""Features of windows that are kept between two groups of classes; with more, windows are encoded again for each."""

Predict = Callable[[Tensor], Prediction]
"""Images ``(N, C, *s)`` -> scores by class; ``Method.predict`` in evaluation mode."""


class Labelled(NamedTuple):
    """What a model says of cases.

    Args:
        labels: Global ids ``(N, *S)`` int16 on the raw grid, or ``(N,)`` where an image has one class.
        confidence: Score of the winning class, same shape, float32.
    """

    labels: Tensor
    confidence: Tensor


@torch.no_grad()
def predict_cases(
    predict: Predict,
    images: Tensor,
    preparation: Preparation,
    size: Sequence[int],
    scores_at_once: int = SCORES_AT_ONCE,
) -> Labelled:
    """Label cases of one size.

    Args:
        predict: The model.
        images: ``(N, C, *s)``, as :meth:`Preparation.show` made them.
        preparation: Of the task that the model learned last.
        size: Spatial size of the raw images; ``()`` where an image has one class.
        scores_at_once: Bound on the scores in memory; at least one class is scored at a time.

    Returns:
        The winning class of every pixel; of equal ones the first channel.
    """
    windows = list(_windows(images.shape[2:], preparation.window, preparation.overlap))
    first = predict(images[windows[0]])
    ids = torch.as_tensor(first.class_ids, dtype=torch.int16, device=images.device)
    per_class = len(images) * max(math.prod(images.shape[2:]), math.prod(size)) if size else len(images)
    chunks = first.chunks(max(1, scores_at_once // per_class))
    hold = len(chunks) > 1 and first.held_bytes * len(windows) <= HELD_BYTES
    held = {0: first}

    def scored(channels: Sequence[int]) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        for number, window in enumerate(windows):
            # taken out, so that features which are not to be kept are gone before the next window's are made
            prediction = held.pop(number, None) or predict(images[window])
            if hold:
                held[number] = prediction
            yield window, prediction.score(channels)

    best: Labelled | None = None
    for channels in chunks:
        scores = _average(scored(channels), images.shape[2:], len(windows))
        confidence, winner = preparation.restore(scores, size).max(1)
        labels = ids[list(channels)][winner]
        if best is not None:
            better = confidence > best.confidence
            labels, confidence = labels.where(better, best.labels), confidence.where(better, best.confidence)
        best = Labelled(labels, confidence)
    assert best is not None  # a prediction has at least one channel
    return best


def _average(scored: Iterable[tuple[tuple[slice, ...], Tensor]], size: Sequence[int], windows: int) -> Tensor:
    """Float32 mean of the scores ``(N, k, *s)`` of overlapping windows over the whole image."""
    total, visits = torch.zeros(()), torch.zeros(())
    for number, (window, scores) in enumerate(scored):
        if windows == 1:
            return scores.float()
        if number == 0:
            total = torch.zeros(*scores.shape[:2], *size, device=scores.device)
            visits = torch.zeros(*size, device=scores.device)
        total[window] += scores
        visits[window[2:]] += 1
    return total.div_(visits)


def starts(length: int, size: int, stride: int) -> list[int]:
    """First positions of windows along one axis; the last window is moved back so that it ends at the border.

    Windows stand ``stride`` apart until the axis is covered: ``length`` 683, ``size`` 512, ``stride`` 341 gives
    0 and 171. An axis shorter than ``size`` gives one window at 0.
    """
    count = -(-max(length - size, 0) // stride) + 1
    return [max(0, min(k * stride, length - size)) for k in range(count)]


def _windows(size: Sequence[int], side: int | None, overlap: float) -> Iterator[tuple[slice, ...]]:
    """Index of each window into images ``(N, C, *s)``; a single one where the whole image fits."""
    if side is None or all(length <= side for length in size):
        yield (slice(None),) * (2 + len(size))
        return
    stride = max(1, round(side * (1 - overlap)))
    for corner in itertools.product(*(starts(length, side, stride) for length in size)):
        yield (slice(None), slice(None), *(slice(at, at + side) for at in corner))
