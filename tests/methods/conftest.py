"""Closed-form tensors, a data set in memory, and the shortest loop that runs a method's phases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from perdure.data.case import Batch, collate
from perdure.data.dataset import Dataset, Draw
from perdure.data.preparation import Preparation
from perdure.data.sampling import Batches, Mix
from perdure.data.source import Source
from perdure.engine.phases import Collect, Train
from perdure.labels import IGNORE, TABLE_SIZE, LabelSpace, label_space, remap_table
from perdure.methods.options import Setup, TrainingOptions
from perdure.networks.segmenter import Segmenter
from perdure.streams.task import Stream, TaskData, TaskSpec, make_stream


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Golden numbers are for one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def wave() -> Callable[..., Tensor]:
    """``s sin(a i + b)`` over the flat index, in float64 and then float32."""

    def make(shape: tuple[int, ...], a: float, b: float = 0.0, s: float = 1.0) -> Tensor:
        flat = torch.arange(int(np.prod(shape)), dtype=torch.float64)
        return (s * torch.sin(a * flat + b)).float().reshape(shape)

    return make


@pytest.fixture
def lab() -> Tensor:
    """Two label maps 64 x 64 with labels 0, 3, 4 and IGNORE; old classes 1, 2, new classes 3, 4, 5."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    labels = torch.zeros(2, 64, 64, dtype=torch.int64)
    labels[0][(y < 32) & (x < 32)] = 3
    labels[0][(y >= 40) & (x >= 20)] = 4
    labels[0][y >= 60] = IGNORE
    labels[1][x + y < 50] = 3
    labels[1][(y >= 20) & (y < 24)] = IGNORE
    assert torch.bincount(labels.flatten(), minlength=TABLE_SIZE)[[0, 3, 4, IGNORE]].tolist() == [4615, 2185, 880, 512]
    return labels


@dataclass
class Blocks(Source):
    """Images of noisy coloured blocks, one class a block, every class in every image."""

    space: LabelSpace
    dims: int = 2
    count: int = 6
    side: int = 16
    name: str = "blocks"
    patients: bool = False
    kind: str = "segmentation"
    other_label: int = 0
    palette: Any = field(init=False)

    def __post_init__(self) -> None:
        self.palette = np.random.default_rng(1).normal(size=(256, 3)).astype(np.float32)

    def names(self, split: str) -> list[str]:
        return [str(i) for i in range(self.count)]

    def mask(self, split: str, name: str) -> Any:
        draw = np.random.default_rng(int(name))
        cells = draw.choice([0, *self.space.ids], size=[self.side // 4] * self.dims)
        cells.flat[: len(self.space)] = self.space.ids
        mask = cells.astype(np.uint8)
        for axis in range(self.dims):
            mask = mask.repeat(4, axis)
        return mask

    def image(self, split: str, name: str) -> Any:
        noise = np.random.default_rng(1000 + int(name)).normal(0, 0.1, [3] + [self.side] * self.dims)
        return (np.moveaxis(self.palette[self.mask(split, name)], -1, 0) + noise).astype(np.float32)

    def fingerprint(self, split: str) -> str:
        return f"blocks {self.dims} {self.count} {self.side} {len(self.space)}"


@pytest.fixture
def make_blocks() -> Callable[..., Stream]:
    """Stream of :class:`Blocks`: one task a group of class ids; an id that comes again is annotated again."""

    def make(groups: list[tuple[int, ...]], dims: int = 2, recurs: bool = True, count: int = 6) -> Stream:
        source = Blocks(label_space([f"c{i}" for i in range(1, 1 + max(map(max, groups)))]), dims, count)

        def spec(group: tuple[int, ...], earlier: set[int]) -> TaskSpec:
            def data(check: Callable[[], None]) -> TaskData:
                def view() -> Dataset:
                    return Dataset(
                        source, "train", tuple(source.names("train")), remap_table(group, 0), Preparation(), True, check
                    )

                return TaskData(view, view, lambda: {"test": view()}, lambda split: view())

            new = tuple(c for c in group if c not in earlier)
            return TaskSpec("+".join(map(str, group)), new, frozenset(group), recurs, data=data)

        specs = [spec(group, {c for before in groups[:i] for c in before}) for i, group in enumerate(groups)]
        return make_stream(source.space, specs, "blocks")

    return make


@pytest.fixture
def make_setup() -> Callable[..., Setup]:
    """Setup of a method with a network of two convolutions (stride 4, width 8 unless said otherwise)."""

    def make(options: Any, dims: int = 2, width: int = 8, stride: int = 4, **training: Any) -> Setup:
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        norm = nn.BatchNorm2d if dims == 2 else nn.BatchNorm3d

        def network() -> Segmenter:
            torch.manual_seed(5)
            body = nn.Sequential(conv(3, width, stride, stride), norm(width), nn.ReLU(), conv(width, width, 1))
            return Segmenter(body, width, stride, dims)

        given: dict[str, Any] = {"epochs": 2, "batch_size": 2, "lr": 0.01} | training
        return Setup(options, TrainingOptions(**given), network)

    return make


def batches_of(data: Batches | Mix, epoch: int = 0) -> Iterator[Batch]:
    """Batches of one epoch, in order; of a mix, each source from its start."""
    parts = data.parts if isinstance(data, Mix) else (data,)
    for step in range(data.steps()):
        cases = []
        for part, batches in enumerate(parts):
            first = step % batches.steps() * batches.size
            picked = range(first, min(first + batches.size, batches.per_epoch))
            cases += [(batches.samples[Draw(i % len(batches.samples), epoch)], part) for i in picked]
        yield collate([case for case, _ in cases], [part for _, part in cases])


@pytest.fixture
def read() -> Callable[..., Iterator[Batch]]:
    """Call it with batches or a mix, and perhaps the number of the epoch."""
    return batches_of


@pytest.fixture
def first_batch() -> Callable[[Batches | Mix], Batch]:
    """The first batch of an epoch."""
    return lambda batches: next(batches_of(batches))


@pytest.fixture
def run_phase() -> Callable[[Any], list[dict[str, float]]]:
    """Run a Train or a Collect phase; returns the loss terms of each step."""

    def run(phase: Any) -> list[dict[str, float]]:
        log: list[dict[str, float]] = []
        if isinstance(phase, Collect):
            phase.module.eval()
            totals: dict[str, Tensor] = {}
            with torch.no_grad():
                for batch in batches_of(phase.data()):
                    for name, value in phase.measure(batch).items():
                        totals[name] = totals.get(name, torch.zeros_like(value)) + value
            phase.finish(totals)
            return log
        assert isinstance(phase, Train) and phase.data is not None and phase.epochs is not None
        phase.module.train()
        optimizer = phase.optimizer()
        for epoch in range(phase.epochs):
            for step, batch in enumerate(batches_of(phase.data(), epoch)):
                torch.manual_seed(100 * epoch + step)
                optimizer.zero_grad()
                terms = phase.loss(batch)
                torch.stack(list(terms.values())).sum().backward()
                optimizer.step()
                log.append({name: float(value.detach()) for name, value in terms.items()})
        if phase.finish is not None:
            phase.finish()
        return log

    return run


@pytest.fixture
def learn(run_phase: Callable[[Any], list[dict[str, float]]]) -> Callable[..., dict[str, list[dict[str, float]]]]:
    """Begin a task and run its phases, all or the first few; returns the log by phase."""

    def go(method: Any, stream: Stream, index: int, phases: int | None = None) -> dict[str, list[dict[str, float]]]:
        task = stream.tasks[index]
        with stream.opened(task):
            torch.manual_seed(index)
            method.begin(task)
            return {phase.name: run_phase(phase) for phase in list(method.phases(task))[:phases]}

    return go
