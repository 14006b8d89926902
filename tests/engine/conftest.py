"""Pictures in memory, a network without normalisation, and an engine in a temporary folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from perdure.data.case import Batch
from perdure.data.dataset import Dataset
from perdure.data.preparation import Preparation
from perdure.data.sampling import Batches
from perdure.data.source import Source
from perdure.engine.checkpoint import Checkpoint
from perdure.engine.engine import Engine
from perdure.engine.machine import Machine
from perdure.engine.options import EngineOptions
from perdure.engine.phases import Phase, Train
from perdure.engine.run_logger import RunLogger
from perdure.engine.state import Stateful
from perdure.labels import TABLE_SIZE, label_space


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Pictures(Source):
    """Picture i is noise of its own; a pixel has label 1 where its first channel is bright."""

    name, kind, patients, other_label = "pictures", "segmentation", False, 0
    space = label_space(["bright"])

    def image(self, split: str, name: str) -> np.ndarray:
        return np.random.default_rng(int(name)).integers(0, 256, (3, 8, 8), dtype=np.uint8)

    def names(self, split: str) -> list[str]:
        return []

    def fingerprint(self, split: str) -> str:
        return ""

    def mask(self, split: str, name: str) -> np.ndarray:
        return (self.image(split, name)[0] > 128).astype(np.uint8)


class Scaled(Preparation):
    def normalised(self, image: Tensor) -> Tensor:
        return image.float() / 255


@pytest.fixture
def view() -> Callable[[int], Dataset]:
    """A training set of so many pictures."""

    def make(count: int) -> Dataset:
        names, table = tuple(map(str, range(count))), np.arange(TABLE_SIZE, dtype=np.int16)
        return Dataset(Pictures(), "train", names, table, Scaled(), True)

    return make


class Toy(Stateful):
    """Two convolutions and a loss of one term."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
        self.dtypes: set[torch.dtype] = set()

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        logits = self.body(batch.images)
        self.dtypes.add(logits.dtype)
        return {"fit": F.cross_entropy(logits, batch.labels)}

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.parameters()])


@pytest.fixture
def toy() -> type[Toy]:
    return Toy


@pytest.fixture
def train() -> Callable[..., Train]:
    """A phase that trains a whole method on batches, one epoch of SGD unless told otherwise."""

    def make(method: Any, batches: Batches | None, **options: Any) -> Train:
        given = {"optimizer": lambda: SGD(method.parameters(), lr=0.5), "epochs": 1, **options}
        data = None if batches is None else lambda: batches
        return Train("train", method, given.pop("loss", method.loss), data=data, **given)

    return make


@dataclass
class Bench:
    """An engine and its folder."""

    engine: Engine
    checkpoint: Checkpoint
    folder: Path

    def run(self, method: nn.Module, phases: Sequence[Phase], task: int = 0, validation: Any = None) -> None:
        self.engine.run(method, phases, task, self.checkpoint.load(method, task), validation)

    @property
    def state(self) -> Path:
        return self.folder / "resume" / "state.safetensors"

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., Bench]:
    """A fresh process's engine in the same folder, each time it is called."""

    def make(**options: Any) -> Bench:
        settings = EngineOptions.model_validate({"device": "cpu", "trackers": [], "log_every": 1, **options})
        machine = Machine(settings, tmp_path / "tracking")
        machine.start_trackers("toy")
        checkpoint = Checkpoint(tmp_path / "resume", machine, settings.save_seconds)
        logger = RunLogger(machine, tmp_path / "log.jsonl", quiet=True)
        return Bench(Engine(machine, settings, 7, checkpoint, logger), checkpoint, tmp_path)

    return make
