"""Data sets that do not label each other's classes: a perfect model scores 100, whatever the union and elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from perdure.data.preparation import Preparation
from perdure.data.source import Source
from perdure.engine.machine import Machine
from perdure.engine.options import EngineOptions
from perdure.labels import label_space
from perdure.methods.prediction import Prediction
from perdure.metrics.evaluate import count
from perdure.metrics.figures import evaluate
from perdure.metrics.measured import run_results
from perdure.streams.description import describe
from perdure.streams.partial_labels import DataSet, Elsewhere, Union, partial_labels
from perdure.streams.task import Stream, merged

ORGANS = ("liver", "kidney", "spleen")
SETS = {"north": ("liver", "kidney"), "south": ("spleen", "liver"), "east": ("spleen",)}


class Hospital(Source):
    """Images whose first channel says which organ is at each pixel, and whose second says which hospital this is.

    With ``hidden`` organs of the other hospitals are in the images too, as background in the masks.
    """

    kind, patients, other_label = "segmentation", False, 0

    def __init__(self, name: str, number: int, labelled: Sequence[str], hidden: bool) -> None:
        self.name, self.number, self.hidden = name, number, hidden
        self.space = label_space(list(labelled))

    def names(self, split: str) -> list[str]:
        return ["0", "1", "2"]

    def organs(self, name: str) -> np.ndarray:
        """Number of the organ at each pixel, 0 for none."""
        drawn = np.random.default_rng([self.number, int(name)]).integers(0, 1 + len(ORGANS), (6, 7))
        known = [1 + ORGANS.index(organ) for organ in (c.name for c in self.space.classes)]
        return drawn if self.hidden else np.where(np.isin(drawn, known), drawn, 0)

    def image(self, split: str, name: str) -> np.ndarray:
        organs = self.organs(name).astype(np.float32)
        return np.stack([organs, np.full_like(organs, self.number), np.zeros_like(organs)])

    def mask(self, split: str, name: str) -> np.ndarray:
        table = np.zeros(1 + len(ORGANS), np.int16)
        for info in self.space.classes:
            table[1 + ORGANS.index(info.name)] = info.id
        return table[self.organs(name)]

    def fingerprint(self, split: str) -> str:
        return f"{self.name} {self.hidden}"


def hospitals(union: Union, elsewhere: Elsewhere) -> Stream:
    sets = [
        DataSet(Hospital(name, number, labelled, elsewhere == "unlabelled"))
        for number, (name, labelled) in enumerate(SETS.items())
    ]
    return partial_labels(sets, preparation=Preparation(), union=union, elsewhere=elsewhere)


def perfect(stream: Stream, seen: Sequence[int]) -> Callable[[Tensor], Prediction]:
    """A model that sees every organ it has learned, also where nobody labelled it.

    Where hospitals have classes of their own (offset), an organ gets the name that it has in the image's hospital.
    """
    ids = {info.name: info.id for info in stream.space.classes}
    tables = []
    for hospital in SETS:
        found = [ids.get(f"{hospital}: {organ}", ids.get(organ, 0)) for organ in ORGANS]
        tables.append([0, *(c if c in seen else 0 for c in found)])

    def predict(images: Tensor) -> Prediction:
        truth = torch.tensor(tables)[images[:, 1].long(), images[:, 0].long()]
        classes = (0, *seen)
        return Prediction.dense(torch.stack([(truth == c).float() for c in classes], 1), classes)

    return predict


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("union", ["names", "offset"])
@pytest.mark.parametrize("elsewhere", ["absent", "unlabelled"])
def test_a_perfect_model_scores_100(union: Union, elsewhere: Elsewhere, joint: bool) -> None:
    stream = hospitals(union, elsewhere)
    stream = merged(stream) if joint else stream
    machine = Machine(EngineOptions(device="cpu", trackers=()))
    counts = {
        task.index: {
            name: count(perfect(stream, task.seen), dataset, task.seen, machine, 2, 0).matrix
            for name, dataset in task.tests().items()
        }
        for task in stream.tasks
    }
    results = run_results(describe(stream, "hospitals", False), counts)
    for after in counts:
        for name in ("miou.all", "dice.all", "accuracy.all"):
            value = evaluate(name, results, after)
            assert value.value == 100, (name, after)
            assert value.n >= len(stream.tasks[after].seen)
    newest = counts[len(stream.tasks) - 1]
    assert {name: counted.cases for name, counted in newest.items()} == dict.fromkeys(SETS, 3)
    known = [counted.annotated for counted in newest.values()]
    assert known == [None] * 3 if elsewhere == "absent" else [len(ids or ()) for ids in known] == [2, 2, 1]


def test_a_model_that_misses_what_is_labelled_does_not_score_100() -> None:
    stream = hospitals("names", "unlabelled")
    task = stream.tasks[-1]
    machine = Machine(EngineOptions(device="cpu", trackers=()))

    def blind(images: Tensor) -> Prediction:
        prediction = perfect(stream, task.seen)(images)
        scores = prediction.scores().clone()
        scores[:, 1] = 0  # never the first class
        return Prediction.dense(scores, prediction.class_ids)

    found = {name: count(blind, dataset, task.seen, machine, 2, 0).matrix for name, dataset in task.tests().items()}
    results = run_results(describe(stream, "hospitals", False), {task.index: found})
    value = evaluate("miou.all", results, task.index).value
    assert value is not None and value < 90
