"""Showing test data to a model and counting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from perdure.data.case import Case, collate
from perdure.data.dataset import Dataset
from perdure.engine.loader import read_cases
from perdure.engine.machine import Machine
from perdure.inference.case import Predict, predict_cases
from perdure.metrics.cases import CaseCounts
from perdure.metrics.confusion import ConfusionMatrix, confusion


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
    each: Callable[[int, Tensor], None] | None = None,
) -> Counted:
    """Confusion counts of a model on a test set, over all processes; fp32, no gradients.

    Args:
        predict: The model in evaluation mode.
        dataset: Test set. Neighbouring images of one size are predicted together.
        class_ids: Foreground classes that count besides label 0; other ground truth is dropped.
        machine: Where to compute.
        batch_size: Most images per forward pass and process.
        workers: Processes that read.
        each: Called with the position of a case and the predicted labels ``(*S)``, in segmentation.

    Raises:
        DataError: The set is empty.
    """
    counts = ConfusionMatrix.empty(class_ids)
    total = torch.zeros(len(counts.labels), len(counts.labels) + 1, dtype=torch.int64, device=machine.device)
    whole = dataset.source.kind == "classification"
    by_case = torch.zeros(0 if whole else len(dataset), len(counts.labels), 3, dtype=torch.int64, device=machine.device)
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
                for k, name in enumerate(batch.names):
                    known = None if batch.annotated is None else batch.annotated[k : k + 1]
                    if each is not None:
                        each(place[name], predicted[k])
                    one = confusion(batch.labels[k : k + 1], predicted[k : k + 1], counts.labels, known)
                    total += one
                    # the last column: predicted where the case does not label that class, so it is no pixel of it
                    by_case[place[name]] = torch.stack([one.sum(1), one[:, :-1].sum(0), one.diagonal()], 1)
    counts.add(machine.total(total))
    counts.cases, counts.annotated = len(dataset), dataset.annotated
    if whole:
        return Counted(counts, None)
    # each process has the rows of its own cases, the others are zero
    return Counted(counts, CaseCounts(counts.labels, machine.total(by_case).cpu().numpy()))


def _of_one_size(cases: Sequence[Case]) -> Iterator[list[Case]]:
    """Runs of neighbouring cases that can be stacked and go back alike."""
    for _, run in groupby(cases, key=lambda case: (case.image.shape, case.grid)):
        yield list(run)
