"""What the end of a task says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from perdure import sealing
from perdure.data.preparation import Photo2D, Preparation
from perdure.labels import label_space
from perdure.methods.options import TrainingOptions
from perdure.metrics.confusion import ConfusionMatrix
from perdure.streams.task import Task

HINTS = {
    "volumes": (Preparation(dims=3).model_copy(update={"kind": "volume3d"}), "volumes.patch", "augment.crop"),
    "slices": (Preparation().model_copy(update={"kind": "slices2d"}), "volumes.size", "augment.crop"),
    "photographs": (Photo2D(patch=(8, 8)), "augment.crop", "volumes."),
}


@pytest.mark.parametrize("name", HINTS)
def test_what_to_try_where_a_class_was_not_learned_names_keys_that_there_are(name: str) -> None:
    preparation, named, other = HINTS[name]
    counts = ConfusionMatrix.empty((1,))
    counts.add(torch.tensor([[90, 0, 0], [10, 0, 0]]))
    said: list[str] = []
    logger: Any = SimpleNamespace(log=lambda **_: None, say=said.append)
    stream = SimpleNamespace(space=label_space(["liver"]))
    recipe = SimpleNamespace(training=TrainingOptions(steps=5))
    experiment: Any = SimpleNamespace(kind="segmentation", stream=stream, recipe=recipe)
    task = Task(0, "organs", (1,), (), frozenset({1}), preparation=preparation)
    sealing._say_what_was_not_learned(experiment, task, {"test": counts}, logger)
    assert len(said) == 1 and "liver" in said[0]
    assert "training.steps" in said[0] and "training.lr" in said[0]
    assert named in said[0] and other not in said[0]
