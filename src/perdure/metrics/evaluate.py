"""Showing test data to a model and counting."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from perdure.data.dataset import Dataset
from perdure.data.sampling import Batches, BatchSampler
from perdure.engine.loader import make_loader
from perdure.engine.machine import Machine
from perdure.errors import DataError
from perdure.metrics.confusion import ConfusionMatrix, confusion

Predict = Callable[[Tensor], Tensor]
"""Images ``(N, C, *S)`` -> labels ``(N, *S)`` in global ids."""


def count(
    predict: Predict, view: Dataset, class_ids: Sequence[int], machine: Machine, batch_size: int, workers: int
) -> ConfusionMatrix:
    """Confusion counts of a model on a test set, over all processes; fp32, no gradients.

    Args:
        predict: The model in evaluation mode.
        view: Test set; the images of a batch must have one size.
        class_ids: Foreground classes that count besides label 0; other ground truth is dropped.
        machine: Where to compute.
        batch_size: Images a batch and process.
        workers: Processes that read.

    Raises:
        DataError: The set is empty, or images of one batch differ in size.
    """
    counts = ConfusionMatrix.empty(class_ids)
    batches = Batches(view, batch_size * machine.world, shuffle=False, drop_last=False)
    reads = make_loader(BatchSampler(batches, 0, 0, batches.steps(), machine.rank, machine.world), workers, pin=False)
    total = counts.tensor().to(machine.device)
    try:
        with torch.no_grad(), machine.autocast("fp32"):
            for batch in reads:
                if batch is not None:
                    on_device = batch.to(machine.device)
                    total += confusion(on_device.labels, predict(on_device.images), counts.labels)
    except RuntimeError as error:
        if "equal size" not in str(error):
            raise
        hint = "set evaluate.batch_size=1, or evaluate.size=N to crop them"
        raise DataError("the test images of a batch differ in size", hint) from error
    counts.add(machine.total(total))
    return counts
