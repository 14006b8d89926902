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
from torch.nn import functional as F

from perdure.data.case import Grid
from perdure.data.preparation import Preparation
from perdure.errors import UsageError
from perdure.labels import BACKGROUND
from perdure.methods.prediction import Part, Prediction

SCORES_AT_ONCE: Final = 1 << 26
"""Scores in memory at a time, over all images of a call: 256 MiB of float32, and as much again on the raw grid."""
HELD_BYTES: Final = 1 << 30
"""Features of windows that are kept between two groups of classes; with more, windows are encoded again for each."""
HELD_SCORES: Final = 1 << 24
"""Scores in memory at a time beside such features: 64 MiB."""
WINDOW_SCORES: Final = 1 << 22
"""Scores of one window in memory at a time, where its features are there already: the network's own are more."""

SLICES: Final = 16
"""Slices of a volume that go through a network for images at once."""

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
    grid: Grid,
    scores_at_once: int = SCORES_AT_ONCE,
) -> Labelled:
    """Label cases of one size.

    Args:
        predict: The model.
        images: ``(N, C, *s)``, as :meth:`Preparation.show` made them. Volumes are shown to a network for images slice
            by slice, along their first axis.
        preparation: Of the task that the model learned last.
        grid: How the images lie in the raw ones; the same for all.
        scores_at_once: Bound on the scores in memory; at least one class is scored at a time.

    Returns:
        The winning class of every pixel; of equal ones the first channel. Outside of ``grid.box`` background.
    """
    if images.ndim - 2 > preparation.dims:
        found = _by_slice(predict, images, preparation, grid, scores_at_once)
    else:
        found = _by_window(predict, images, preparation, grid, scores_at_once)
    if grid.inside == grid.size:
        return found
    place = (slice(None), *(slice(first, last) for first, last in grid.box))
    labels = torch.full((len(images), *grid.size), BACKGROUND, dtype=torch.int16, device=images.device)
    confidence = torch.ones(len(images), *grid.size, device=images.device)
    labels[place], confidence[place] = found
    return Labelled(labels, confidence)


def _by_slice(predict: Predict, volumes: Tensor, preparation: Preparation, grid: Grid, scores_at_once: int) -> Labelled:
    """Volumes ``(N, C, D, *s)`` through a network for images, some slices at a time."""
    depth, *plane = grid.turned
    if depth != volumes.shape[2]:
        raise UsageError(
            f"{volumes.shape[2]} slices were prepared of a volume with {depth}", "slices are never resized"
        )
    slices = volumes.transpose(1, 2).flatten(0, 1)
    parts = [
        _by_window(predict, some, preparation, Grid(tuple(plane)), scores_at_once)
        for some in torch.split(slices, SLICES)
    ]
    shape = (len(volumes), depth, *plane)
    labels, confidence = (torch.cat(maps).view(shape) for maps in zip(*parts, strict=True))
    return Labelled(grid.back(labels), grid.back(confidence))


def _by_window(predict: Predict, images: Tensor, preparation: Preparation, grid: Grid, scores_at_once: int) -> Labelled:
    """Images ``(N, C, *s)`` window by window; labels ``(N, *grid.inside)``."""
    shape, window = images.shape[2:], preparation.window
    sides = tuple(shape) if window is None else (window,) * len(shape) if isinstance(window, int) else window
    if len(sides) != len(shape):
        raise UsageError(f"a window of {len(sides)} axes cannot cut images of {len(shape)}", "one side per axis")
    missing = [max(0, side - n) if preparation.fills_window else 0 for n, side in zip(shape, sides, strict=True)]
    inside = tuple(slice(lack // 2, lack // 2 + n) for n, lack in zip(shape, missing, strict=True))
    if any(missing):
        # F.pad counts from the last axis; of an odd number nnU-Net puts the larger half behind
        images = F.pad(images, [n for lack in reversed(missing) for n in (lack // 2, lack - lack // 2)])
    axes = [
        starts(length, side, max(1, round(side * (1 - preparation.overlap))))
        for length, side in zip(images.shape[2:], sides, strict=True)
    ]
    corners = list(itertools.product(*axes))
    if preparation.blend == "centre" and len(corners) > 1:
        found = _by_centre(predict, images, axes, sides, scores_at_once)
        labels, confidence = (
            preparation.restore_labels(found_map[(slice(None), *inside)], grid) for found_map in found
        )
        return Labelled(labels, confidence)
    windows = [_window(corner, sides) for corner in corners]
    parts = _averaged(predict, images, windows, grid, scores_at_once)
    return _best(
        # whole images with one class have scores without places
        Part(ids, preparation.restore(scores[(slice(None), slice(None), *inside)] if any(missing) else scores, grid))
        for ids, scores in parts
    )


def _best(parts: Iterable[Part]) -> Labelled:
    """The class with the highest score, seen a few classes at a time."""
    best: Labelled | None = None
    for class_ids, scores in parts:
        confidence, winner = scores.max(1)
        labels = torch.as_tensor(class_ids, dtype=torch.int16, device=scores.device)[winner]
        if best is not None:
            better = confidence > best.confidence
            labels, confidence = labels.where(better, best.labels), confidence.where(better, best.confidence)
        best = Labelled(labels, confidence)
    assert best is not None  # a prediction has at least one channel
    return best


def _averaged(
    predict: Predict,
    images: Tensor,
    windows: Sequence[tuple[slice, ...]],
    grid: Grid,
    scores_at_once: int,
) -> Iterator[Part]:
    """Scores of a few classes at a time ``(N, k, *s)``, averaged where windows overlap."""
    shape = images.shape[2:]
    first = predict(images[windows[0]])
    per_class = len(images) * max(math.prod(shape), math.prod(grid.inside)) if grid.size else len(images)
    chunks = first.chunks(max(1, scores_at_once // per_class))
    hold = len(chunks) > 1 and first.held_bytes * len(windows) <= HELD_BYTES
    if hold and first.held_bytes:
        # with the features of all windows in memory a pass costs little, and fewer scores have to lie beside them
        chunks = first.chunks(max(1, min(scores_at_once, HELD_SCORES) // per_class))
    held = {0: first}
    for channels in chunks:
        total, visits = torch.zeros(()), torch.zeros(())
        for number, window in enumerate(windows):
            # taken out, so that features which are not to be kept are gone before the next window's are made
            prediction = held.pop(number, None) or predict(images[window])
            if hold:
                held[number] = prediction
            scores = prediction.score(channels).float()
            if len(windows) == 1:
                total = scores
                break
            if number == 0:
                total = torch.zeros(*scores.shape[:2], *shape, device=scores.device)
                visits = torch.zeros(*shape, device=scores.device)
            total[window] += scores
            visits[window[2:]] += 1
        if len(windows) > 1:
            total.div_(visits)
        yield Part(tuple(first.class_ids[channel] for channel in channels), total)


def _by_centre(
    predict: Predict, images: Tensor, axes: Sequence[Sequence[int]], sides: Sequence[int], scores_at_once: int
) -> Labelled:
    """Each pixel's class from the window in whose middle it lies most: every window is scored once, for all classes.

    Averaging needs all scores of a class over the whole image. For volumes with many classes that is either too much
    memory or, a few classes at a time, too many passes of the network.
    """
    grid = images.shape[2:]
    labels = torch.empty(len(images), *grid, dtype=torch.int16, device=images.device)
    confidence = torch.empty(len(images), *grid, device=images.device)
    # along each axis: where a window starts, and the part of the axis that is nearer to its middle than to any other's
    cores: list[list[tuple[int, int, int]]] = []
    for first, side, length in zip(axes, sides, grid, strict=True):
        borders = [(a + side + b) // 2 for a, b in itertools.pairwise(first)]
        cores.append(list(zip(first, [0, *borders], [*borders, length], strict=True)))
    per_class = len(images) * math.prod(sides)
    for core in itertools.product(*cores):
        prediction = predict(images[_window([start for start, _, _ in core], sides)])
        # few classes at a time cost nothing where features are held; without any, each call may run a network again
        bound = min(scores_at_once, WINDOW_SCORES) if prediction.held_bytes else scores_at_once
        most = max(1, bound // per_class)
        inside = (slice(None), slice(None), *(slice(a - start, b - start) for start, a, b in core))
        found = _best(
            Part(tuple(prediction.class_ids[c] for c in channels), prediction.score(channels)[inside].float())
            for channels in prediction.chunks(most)
        )
        place = (slice(None), *(slice(a, b) for _, a, b in core))
        labels[place], confidence[place] = found
    return Labelled(labels, confidence)


def _window(corner: Sequence[int], sides: Sequence[int]) -> tuple[slice, ...]:
    """Index of a window into images ``(N, C, *s)``."""
    return (slice(None), slice(None), *(slice(at, at + side) for at, side in zip(corner, sides, strict=True)))


def starts(length: int, size: int, stride: int) -> list[int]:
    """First positions of windows along one axis; the last window is moved back so that it ends at the border.

    Windows stand ``stride`` apart until the axis is covered: ``length`` 683, ``size`` 512, ``stride`` 341 gives
    0 and 171. An axis shorter than ``size`` gives one window at 0.
    """
    count = -(-max(length - size, 0) // stride) + 1
    return [max(0, min(k * stride, length - size)) for k in range(count)]
