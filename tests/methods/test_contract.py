"""Every method on every network it claims, through the real engine: learns, resumes, predicts, keeps what it says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from perdure.config.build import method_class
from perdure.engine.checkpoint import Checkpoint
from perdure.engine.engine import Engine
from perdure.engine.interrupt import Interrupted
from perdure.engine.journal import Journal
from perdure.engine.machine import Machine
from perdure.engine.options import EngineOptions
from perdure.kept.ledger import read_kept, read_ledger, write_kept, write_ledger
from perdure.labels import label_space
from perdure.methods import METHODS
from perdure.methods.options import Setup, TrainingOptions
from perdure.metrics.counts import Counts, confusion
from perdure.metrics.figures import class_values
from perdure.networks.build import build_network
from perdure.seeds import fold, seeded
from perdure.streams.class_incremental import class_incremental
from perdure.streams.merged import merged
from perdure.streams.task import Stream

pytestmark = pytest.mark.contract
TINY = {"backbone": "tiny_resnet", "tiny_channels": [8, 8, 8, 16], "output_stride": 4, "width": 16}
NETWORKS = {
    "deeplab-2d": (2, 16, "deeplab", TINY),
    "unet-2d": (2, 16, "residual_unet", {"widths": [8, 16], "norm": "group"}),
    "unet-3d": (3, 8, "residual_unet", {"widths": [8, 16], "norm": "group"}),
}
SETTINGS = {"epochs": 20, "batch_size": 4, "optimizer": "adamw", "lr": 0.01}
RATES = {"later_lr": 0.003, "neck_lr": 1, "classifier_lr": 1, "new_classifier_lr": 10}
OPTIONS = EngineOptions(device="cpu", threads=1, trackers=(), save_seconds=1e9)


@dataclass(frozen=True)
class Bars:
    """Image i holds a bar of each of two of four classes; a class shows by its colour."""

    dims: int
    side: int
    name = "bars"
    patients = False
    other_label = 0
    space = label_space(["a", "b", "c", "d"])

    def names(self, split: str) -> list[str]:
        return [f"{split}{i}" for i in range(24)]

    def mask(self, split: str, name: str) -> np.ndarray:
        number = int(name.removeprefix(split))
        mask = np.zeros((self.side,) * self.dims, np.uint8)
        half = self.side // 2
        mask[..., 1 : half - 1] = 1 + number % 4
        mask[..., half + 1 : -1] = 1 + (number // 4) % 4
        return mask

    def image(self, split: str, name: str) -> np.ndarray:
        mask = self.mask(split, name)
        noise = np.random.default_rng(fold(split, name)).normal(0, 0.1, (3, *mask.shape))
        colors = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, -1]], np.float64)
        return (np.moveaxis(colors[mask], -1, 0) + noise).astype(np.float32)

    def fingerprint(self, split: str) -> str:
        return f"{split}-{self.dims}-{self.side}"


def _plain(image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    return image - 0.3, label.long()


def _stream(dims: int, side: int, joint: bool) -> Stream:
    stream = class_incremental(Bars(dims, side), base=2, step=2, train_transform=_plain, eval_transform=_plain)
    return merged(stream) if joint else stream


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def learn(tmp_path: Path, method: str, network: str) -> Callable[..., tuple[torch.nn.Module, list[Path]]]:
    """Run the stream with sealed folders in between; ``stop_at`` stops and resumes at a step of the last task."""
    dims, side, name, settings = NETWORKS[network]
    kind = method_class(method)
    training = TrainingOptions(**SETTINGS, **RATES)

    def built() -> torch.nn.Module:
        with seeded(1):
            made = partial(build_network, name, dims, 3, **settings)
            return kind(Setup(kind.Options(), training, made))  # type: ignore[call-arg,return-value]

    def run(folder: str, stop_at: int | None = None) -> tuple[torch.nn.Module, list[Path]]:
        stream = _stream(dims, side, kind.sees_all_tasks)
        machine = Machine(OPTIONS)
        learner, sealed = built(), []
        for task in stream.tasks:
            checkpoint = Checkpoint(tmp_path / folder / "resume", machine, OPTIONS.save_seconds)
            engine = Engine(machine, OPTIONS, 1, checkpoint, Journal(machine, quiet=True))
            with stream.opened(task):
                _begin(learner, task)
                before = copy.deepcopy(learner)
                if stop_at is not None and task is stream.tasks[-1]:
                    checkpoint.due = _stop_after(stop_at)  # type: ignore[method-assign]
                    with pytest.raises(Interrupted):
                        engine.run(learner, learner.phases(task), task.index, checkpoint.load(learner, task.index))
                    learner = before
                    checkpoint = Checkpoint(tmp_path / folder / "resume", machine, OPTIONS.save_seconds)
                    engine = Engine(machine, OPTIONS, 1, checkpoint, Journal(machine, quiet=True))
                engine.run(learner, learner.phases(task), task.index, checkpoint.load(learner, task.index))
            checkpoint.clear()
            sealed.append(tmp_path / folder / task.name)
            entries = write_kept(sealed[-1], learner.state_dict(), learner.kept(), len(task.seen))
            write_ledger(sealed[-1], task.name, entries, patients=False)
        return learner.eval(), sealed

    return run


def _begin(learner: torch.nn.Module, task: object) -> None:
    with seeded(2):
        learner.begin(task)


def _stop_after(step: int) -> Callable[[int, bool], tuple[bool, bool]]:
    return lambda now, stopping: (now == step, now == step)


def test_learns_predicts_and_keeps_what_it_says(learn: Callable, method: str, network: str) -> None:
    learner, sealed = learn("run")
    dims, side, *_ = NETWORKS[network]
    source = Bars(dims, side)
    names = source.names("test")
    images = torch.stack([_plain(torch.from_numpy(source.image("test", n)), torch.zeros(1))[0] for n in names])
    labels = torch.stack([torch.from_numpy(source.mask("test", n)).long() for n in names])
    with torch.no_grad():
        prediction = learner.predict(images)
    assert prediction.scores.shape == (len(names), len(prediction.class_ids), *labels.shape[1:])
    assert set(prediction.class_ids) == {0, 1, 2, 3, 4}
    counts = Counts.empty((1, 2, 3, 4))
    counts.add(confusion(labels, prediction.labels(), counts.labels))
    iou = {c: value.value or 0.0 for c, value in class_values("iou", counts).items()}
    assert min(iou[3], iou[4]) > 25, f"the newest classes are not learned: {iou}"
    if method != "finetune":
        assert min(iou[1], iou[2]) > 55, f"the first classes are forgotten: {iou}"
    state, back = learner.state_dict(), read_kept(sealed[-1])
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    listed = [entry["name"] for entry in read_ledger(sealed[-1])["items"]]
    assert listed == ["weights", *(item.name for item in learner.kept())]


def test_a_stopped_run_ends_with_the_same_bytes(learn: Callable) -> None:
    _, whole = learn("whole")
    _, stopped = learn("stopped", stop_at=3)
    for one, two in zip(whole, stopped, strict=True):
        files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
        assert files
        assert all((one / f).read_bytes() == (two / f).read_bytes() for f in files)
