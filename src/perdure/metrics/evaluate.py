"""Showing test data to a model and counting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Final, NamedTuple

import torch
from torch import Tensor

from perdure.data.case import Case, collate
from perdure.data.dataset import Dataset
from perdure.engine.loader import read_cases
from perdure.engine.machine import Machine
from perdure.inference.case import Predict, predict_cases
from perdure.metrics.cases import CaseCounts
from perdure.metrics.confusion import ConfusionMatrix, confusion, paired, tally
from perdure.metrics.surfaces import in_mm, surface_figures

PIXELS_AT_ONCE: Final = 1 << 24
"""Of a case, that are counted together: 128 MiB for each array of 64-bit numbers."""


class Counted(NamedTuple):
    """Counts of a test set: all of it, and by case (``None`` where an image has one class)."""

    matrix: ConfusionMatrix
    cases: CaseCounts | None


def count(
    predict: Predict,
    dataset: Dataset,
    class_ids: Sequence[int],
    machine: Machine,
    batch_size: int,
    workers: int,
    tolerance: float | None = None,
    each: Callable[[int, Tensor], None] | None = None,
) -> Counted:
    """Confusion counts of a model on a test set, over all processes; fp32, no gradients.

    Cases are read, predicted and counted one batch after another: no more than that is ever in memory.

    Args:
        predict: The model in evaluation mode.
        dataset: Test set. Neighbouring images of one size are predicted together.
        class_ids: Foreground classes that count besides label 0; other ground truth is dropped.
        machine: Where to compute.
        batch_size: Most images per forward pass and process.
        workers: Processes that read.
        tolerance: Of the surface Dice, in mm; ``None`` if surfaces are not to be measured. They are only where a case
            has its spacing in mm.
        each: Called with the position of a case and the predicted labels ``(*S)``, in segmentation.

    Raises:
        DataError: The set is empty.
        UsageError: Surfaces are to be measured, and the packages for it are not installed.
    """
    counts = ConfusionMatrix.empty(class_ids)
    total = torch.zeros(len(counts.labels), len(counts.labels) + 1, dtype=torch.int64, device=machine.device)
    whole = dataset.source.kind == "classification"
    by_case = torch.zeros(0 if whole else len(dataset), len(counts.labels), 3, dtype=torch.int64, device=machine.device)
    # -1 where there is no figure, which can be summed over processes; a case that nobody measured stays 0
    surfaces = torch.zeros(by_case.shape, dtype=torch.float64)
    place = {name: position for position, name in enumerate(dataset.names)}
    reads = read_cases(dataset, batch_size, workers, machine.rank, machine.world)
    with torch.no_grad(), machine.autocast("fp32"):
        for cases in reads:
            for same in _of_one_size(cases):
                batch = collate(same).to(machine.device)
                grid = same[0].grid
                assert grid is not None  # every preparation gives one to a case that is to be predicted
                predicted = predict_cases(predict, batch.images, dataset.preparation, grid).labels
                if whole:
                    total += confusion(batch.labels, predicted, counts.labels, batch.annotated)
                    continue
                for k, case in enumerate(same):
                    known = None if batch.annotated is None else batch.annotated[k : k + 1]
                    if each is not None:
                        each(place[case.name], predicted[k])
                    one, truth, guess = _count_case(batch.labels[k], predicted[k], counts.labels, known)
                    total += one
                    # the last column: predicted where the case does not label that class, so it is no pixel of it
                    by_case[place[case.name]] = torch.stack([one.sum(1), one[:, :-1].sum(0), one.diagonal()], 1)
                    if tolerance is not None and in_mm(case.geometry, case.label.ndim):
                        found = surface_figures(truth, guess, len(counts.labels), case.geometry.spacing, tolerance)
                        surfaces[place[case.name]] = torch.from_numpy(found).nan_to_num(-1)
    counts.add(machine.total(total))
    counts.cases, counts.annotated = len(dataset), dataset.annotated
    if whole:
        return Counted(counts, None)
    # each process has the rows of its own cases, the others are zero
    distances = machine.total(surfaces.to(machine.device)).cpu() if machine.world > 1 else surfaces
    measured = distances[:, :1, :1] < 0  # label 0 never has a figure where a case was measured
    distances = distances.masked_fill(~measured | (distances < 0), torch.nan)
    return Counted(counts, CaseCounts(counts.labels, machine.total(by_case).cpu().numpy(), distances.numpy()))


def _count_case(
    labels: Tensor, predicted: Tensor, ids: tuple[int, ...], annotated: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts of a case ``(*S)``, and row and column of each pixel as int16, see :func:`paired`.

    Some slices at a time: rows and columns are found as int64, which for a large volume would be gigabytes.
    """
    slices = max(1, PIXELS_AT_ONCE * len(labels) // max(1, labels.numel()))
    counts = torch.zeros(len(ids), len(ids) + 1, dtype=torch.int64, device=labels.device)
    maps: list[tuple[Tensor, Tensor]] = []
    for some, said in zip(torch.split(labels, slices), torch.split(predicted, slices), strict=True):
        truth, guess = paired(some[None], said[None], ids, annotated)
        counts += tally(truth, guess, len(ids))
        maps.append((truth[0].short(), guess[0].short()))
    whole = [torch.cat(parts) for parts in zip(*maps, strict=True)]
    return counts, whole[0], whole[1]


def _of_one_size(cases: Sequence[Case]) -> Iterator[list[Case]]:
    """Runs of neighbouring cases that can be stacked and go back alike."""
    for _, run in groupby(cases, key=lambda case: (case.image.shape, case.grid)):
        yield list(run)
