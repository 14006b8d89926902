"""The model before a task, on the new data: what it says there is compared with what it says when it has learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from perdure.config.build import Experiment
from perdure.config.recipe import DataSetsSection
from perdure.data.dataset import Dataset
from perdure.engine.machine import Machine
from perdure.files import write_atomic
from perdure.labels import BACKGROUND
from perdure.methods.method import Method
from perdure.methods.options import Options
from perdure.metrics.changes import BEFORE, OUTPUTS
from perdure.metrics.confusion import ConfusionMatrix, confusion
from perdure.metrics.continual import dice_of
from perdure.metrics.evaluate import Counted, count
from perdure.metrics.measured import class_values
from perdure.metrics.numbers import DIGITS, TaskNumbers
from perdure.streams.task import Task


def told_by_name(experiment: Experiment, task: Task, machine: Machine) -> float | None:
    """How well the model before a task predicts the classes that the task will teach, from their names alone.

    Mean IoU in percent on the task's test samples, beside the classes learned so far; ``None`` where the method reads
    no names, the task teaches nothing new, or no sample shows a new class. The method has to be as it was sealed.
    """
    method, recipe = experiment.method, experiment.recipe
    if not (method.reads_names and task.index and task.new):
        return None
    method.to(machine.device).eval().add_names({c: task.space.name(c) for c in task.new})
    at_once, workers = recipe.evaluate.batch_size, recipe.engine.workers
    sets = task.tests().values()
    counts = [count(method.predict, tests, task.seen, machine, at_once, workers).matrix for tests in sets]
    values = class_values("iou", reduce(add, counts))
    known = [value for c in task.new if (value := values[c].value) is not None]
    return round(sum(known) / len(known), DIGITS) if known else None


class Before:
    """Outputs of the model as it was, one file a test case, among the working files of the task.

    Args:
        experiment: The method has to be as it was sealed; :meth:`take` is called before it begins the task.
        task: Any but the first of a stream of data sets.
        folder: Where the outputs lie until the task is sealed.
    """

    def __init__(self, experiment: Experiment, task: Task, folder: Path) -> None:
        self.experiment, self.task, self.folder = experiment, task, folder
        self.as_it_was = ConfusionMatrix.empty(task.old)
        labels = 1 + len(task.seen)
        self.moved = torch.zeros(labels, labels + 1, dtype=torch.int64)
        self.numbers = TaskNumbers()

    @classmethod
    def of(cls, experiment: Experiment, task: Task, folder: Path) -> Before | None:
        """For a task that changes what a model has learned from an earlier data set; else ``None``."""
        several = isinstance(experiment.recipe.stream, DataSetsSection)
        return cls(experiment, task, folder) if several and task.index and task.old else None

    def take(self, machine: Machine) -> ConfusionMatrix:
        """Show the new test cases to the model as it is; returns its counts against their labels."""
        self.as_it_was, self._newest = self._count(self.experiment.method, machine, self._keep)
        return self.as_it_was

    def look_back(self, earlier: Iterable[Method[Options]], machine: Machine) -> None:
        """Measure earlier models on the new test cases too, for forward generalisation.

        Only here both are at hand: when those models were made nobody had the new data, and later it may be gone.
        Nothing is done where the tasks annotate other classes, of which such models know nothing.

        Args:
            earlier: The untrained model, then the one after each task but the last one, which :meth:`take` has shown
                the cases to.
            machine: Where to compute.
        """
        task = self.task
        if any(other.annotated != task.annotated for other in self.experiment.stream.tasks[: task.index]):
            return
        counted = [*(self._count(method, machine).cases for method in earlier), self._newest]
        dice = [None if cases is None else dice_of(cases, task.annotated) for cases in counted]
        self.numbers = TaskNumbers(untrained=dice[0], earlier=tuple(dice[1:]))

    def _count(
        self, method: Method[Options], machine: Machine, each: Callable[[int, Tensor], None] | None = None
    ) -> Counted:
        recipe = self.experiment.recipe
        at_once, workers = recipe.evaluate.batch_size, recipe.engine.workers
        predict = method.to(machine.device).eval().predict
        return count(predict, self._tests, self.task.old, machine, at_once, workers, each=each)

    def compare(self, position: int, labels: Tensor) -> None:
        """Count the new output of a test case against the old one."""
        with np.load(self._place(position), allow_pickle=False) as kept:
            old = torch.from_numpy(kept["labels"])
        self.moved += confusion(old[None], labels[None].cpu(), (BACKGROUND, *self.task.seen))

    def finished(self, machine: Machine) -> dict[str, ConfusionMatrix]:
        """Both matrices, when every test case was compared; the content of ``changes.json``."""
        outputs = ConfusionMatrix.empty(self.task.seen)
        outputs.add(machine.total(self.moved.to(machine.device)))
        outputs.cases = len(self._tests)
        return {OUTPUTS: outputs, BEFORE: self.as_it_was}

    @property
    def _tests(self) -> Dataset:
        return self.task.tests()[self.task.name]

    def _keep(self, position: int, labels: Tensor) -> None:
        arrays = labels.cpu().numpy()

        def write(part: Path) -> None:
            with part.open("wb") as stream:
                np.savez_compressed(stream, labels=arrays)

        write_atomic(self._place(position), write)

    def _place(self, position: int) -> Path:
        return self.folder / "before" / f"{position:05d}.npz"
