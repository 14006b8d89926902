"""A run of CCSI that is stopped at any moment where it could be saved ends with the same bytes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from perdure.data.preparation import Preparation
from perdure.data.source import Source
from perdure.engine.checkpoint import Checkpoint
from perdure.engine.engine import Engine
from perdure.engine.machine import Machine
from perdure.engine.options import EngineOptions
from perdure.engine.run_logger import RunLogger
from perdure.errors import Interrupted
from perdure.labels import label_space
from perdure.methods.ccsi.ccsi import Ccsi
from perdure.methods.inversion import engine as inversion
from perdure.methods.options import Setup, TrainingOptions
from perdure.networks.cosine_resnet import cosine_resnet
from perdure.seeds import derive_seed, seeded
from perdure.streams.class_incremental import class_incremental

OPTIONS = EngineOptions(device="cpu", threads=1, trackers=(), save_seconds=1e9)
SETTINGS: dict[str, Any] = {
    "per_class": 4,
    "previews": 1,
    "balance": "sampler+weights",
    "synthesis": {"steps": 3, "warmup": 1, "group_size": 4, "groups_at_once": 1, "statistics": "class"},
}


class Shades(Source):
    """Sixteen grey pictures; the class shows in the brightness."""

    name, kind, patients, other_label = "shades", "classification", False, 0
    space = label_space(["a", "b", "c", "d"], background=None)

    def names(self, split: str) -> list[str]:
        return [str(i) for i in range(16)]

    def mask(self, split: str, name: str) -> np.ndarray:
        return np.asarray(1 + int(name) % 4, np.uint8)

    def image(self, split: str, name: str) -> np.ndarray:
        noise = np.random.default_rng(derive_seed(split, name)).uniform(0, 0.2, (1, 32, 32))
        return (noise + 0.2 * (int(name) % 4)).astype(np.float32)

    def fingerprint(self, split: str) -> str:
        return split


def _run(folder: Path, stop_at: int | None) -> tuple[dict[str, Tensor], int]:
    """State after two tasks, stopped at the n-th moment of the second one and begun again; and the moments."""
    stream = class_incremental(Shades(), base=2, step=2, preparation=Preparation())  # type: ignore[arg-type]
    machine, moments = Machine(OPTIONS), itertools.count()

    def fresh() -> Ccsi:
        training = TrainingOptions(epochs=2, batch_size=4, lr=0.05, momentum=0, freeze_norm=False)
        with seeded(1):
            return Ccsi(Setup(Ccsi.Options.model_validate(SETTINGS), training, lambda: cosine_resnet(1)))

    def engine(due: Callable[[int, bool], tuple[bool, bool]]) -> Engine:
        checkpoint = Checkpoint(folder / "resume", machine, OPTIONS.save_seconds)
        checkpoint.due = due  # type: ignore[method-assign]
        return Engine(machine, OPTIONS, 1, checkpoint, RunLogger(machine, quiet=True))

    def learn(learner: Ccsi, index: int, due: Callable[[int, bool], tuple[bool, bool]]) -> None:
        task, work = stream.tasks[index], engine(due)
        with stream.opened(task):
            with seeded(2):
                learner.begin(task)
            work.run(learner, learner.phases(task), index, work.checkpoint.load(learner, index))

    def never(step: int, stopping: bool) -> tuple[bool, bool]:
        next(moments)
        return False, False

    def once(step: int, stopping: bool) -> tuple[bool, bool]:
        now = next(moments) == stop_at
        return now, now

    learner = fresh()
    learn(learner, 0, lambda step, stopping: (False, False))
    engine(never).checkpoint.clear()
    sealed = {key: value.clone() for key, value in learner.state_dict().items()}
    if stop_at is not None:
        with pytest.raises(Interrupted):
            learn(learner, 1, once)
        from perdure.engine.state import restore

        learner = fresh()  # another process: what was in memory is gone
        with seeded(2):
            learner.begin(stream.tasks[0])
        restore(learner, sealed)
    learn(learner, 1, never)
    return dict(learner.state_dict()), next(moments)


def test_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inversion, "CHECKPOINT_EVERY", 1)
    whole, moments = _run(tmp_path / "whole", None)
    assert moments > 12, "the run has too few moments to be worth stopping"
    for stop_at in range(1, moments, 5):
        stopped, _ = _run(tmp_path / str(stop_at), stop_at)
        assert stopped.keys() == whole.keys()
        wrong = [key for key in whole if not torch.equal(whole[key].nan_to_num(-1), stopped[key].nan_to_num(-1))]
        assert not wrong, f"stopped at moment {stop_at}: {wrong[0]} differs"
