"""Time of an engine step against a bare PyTorch loop: same network, same loss, same reading of the same data.

    python benchmarks/engine_overhead.py [--device cuda] [--steps 20] [--pairs 7] [--case NAME] [--json FILE]

Both loops run in turn, so that a busy machine slows both down. On a CPU the process's own time is counted, on a GPU
the clock. A block starts after some steps of warm-up; starting and ending a phase is not part of a step. The
engine does what it does by default: seeds every step, sums the loss terms, checks for signals and for the time to
save, writes a log line and TensorBoard scalars every 20 steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from perdure.data.case import collate
from perdure.data.dataset import Dataset
from perdure.data.preparation import Preparation
from perdure.data.sampling import Batches
from perdure.data.source import Image, Mask, Source, Split
from perdure.engine.checkpoint import Checkpoint, Position
from perdure.engine.engine import Engine
from perdure.engine.machine import Machine
from perdure.engine.options import EngineOptions
from perdure.engine.phases import Train
from perdure.engine.run_logger import RunLogger
from perdure.labels import TABLE_SIZE, label_space
from perdure.methods.finetune import Finetune
from perdure.methods.options import Setup, TrainingOptions
from perdure.methods.training import make_optimizer
from perdure.networks.build import build_network
from perdure.streams.task import Task

WARM = 5
CLASSES = 10


class Case(NamedTuple):
    """Network, side of the images and images per step."""

    network: str
    settings: dict[str, Any]
    side: int
    batch: int


CASES = {
    "resnet18-deeplab": Case("deeplab", {"backbone": "resnet18", "weights": "random", "output_stride": 16}, 128, 8),
    "demo": Case(
        "deeplab",
        {"backbone": "tiny_resnet", "tiny_channels": [16, 24, 32, 48], "output_stride": 4, "width": 48},
        64,
        16,
    ),
    "tiny": Case(
        "deeplab", {"backbone": "tiny_resnet", "tiny_channels": [4, 4, 8, 8], "output_stride": 4, "width": 8}, 32, 8
    ),
}


class Noise(Source):
    """Random images with random labels, in memory."""

    name, kind, patients, other_label = "noise", "segmentation", False, 0
    space = label_space([str(c) for c in range(1, CLASSES + 1)])

    def __init__(self, side: int, count: int) -> None:
        draw = np.random.default_rng(0)
        self.images = draw.integers(0, 256, (count, 3, side, side), np.uint8)
        self.masks = draw.integers(0, CLASSES + 1, (count, side, side), np.int16)

    def names(self, split: Split) -> list[str]:  # noqa: ARG002
        """Numbers."""
        return [str(i) for i in range(len(self.images))]

    def image(self, split: Split, name: str) -> Image:  # noqa: ARG002
        """Image of a sample."""
        return self.images[int(name)]

    def mask(self, split: Split, name: str) -> Mask:  # noqa: ARG002
        """Labels of a sample."""
        return self.masks[int(name)]

    def fingerprint(self, split: Split) -> str:  # noqa: ARG002
        """Never asked for."""
        return ""


class Scaled(Preparation):
    """Images in 0..1, without augmentation: both loops read the same way and spend little time on it."""

    def show(self, image: Tensor) -> Tensor:
        """Divide by 255."""
        return image.float().div_(255)


class Bench:
    """One network with its data, trained by either loop."""

    def __init__(self, case: Case, machine: Machine, steps: int, folder: Path) -> None:
        torch.manual_seed(0)
        self.training = TrainingOptions(batch_size=case.batch, lr=1e-3)
        network = build_network(case.network, 2, 3, **case.settings)
        self.method = Finetune(Setup(Finetune.Options(), self.training, lambda: network))
        classes = tuple(range(1, CLASSES + 1))
        self.method.begin(Task(0, "all", classes, (), frozenset(classes)))
        self.method.to(machine.device).train()
        self.machine, self.steps, self.case = machine, WARM + steps, case
        source = Noise(case.side, 4 * case.batch)
        table = np.arange(TABLE_SIZE, dtype=np.int16)
        self.data = Dataset(source, "train", tuple(source.names("train")), table, Scaled(), training=True)
        logger = RunLogger(machine, folder / "log.jsonl", quiet=True)
        self.engine = Engine(machine, machine.options, 0, Checkpoint(folder / "resume", machine, 1e9), logger)
        self.times: list[float] = []

    def mark(self, step: int) -> None:
        """Read the clock at the end of the warm-up and at the end."""
        if step + 1 not in (WARM, self.steps):
            return
        if self.machine.device.type == "cuda":
            torch.cuda.synchronize()
            self.times.append(time.perf_counter())
        else:
            self.times.append(time.process_time())

    def with_engine(self) -> float:
        """Milliseconds per step."""
        self._begin(deterministic=True)
        phase = Train(
            name="train",
            module=self.method,
            loss=self.method.loss,
            optimizer=lambda: make_optimizer(self.method.network, self.training, later=False),
            data=lambda: Batches(self.data, self.case.batch),
            steps=self.steps,
            after_step=self.mark,
        )
        self.engine.run(self.method, [phase], 0, Position())
        return self._result()

    def bare(self) -> float:
        """Milliseconds per step of the loop that everybody writes."""
        self._begin(deterministic=False)
        optimizer = make_optimizer(self.method.network, self.training, later=False)
        loader = DataLoader(self.data, self.case.batch, shuffle=True, drop_last=True, collate_fn=collate)
        self.method.train()
        step = 0
        while step < self.steps:
            for batch in loader:
                loss = self.method.loss(batch.to(self.machine.device))["current"]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                self.mark(step)
                step += 1
                if step == self.steps:
                    break
        return self._result()

    def _begin(self, deterministic: bool) -> None:
        """The engine asks torch for deterministic algorithms on a CPU; a bare loop does not."""
        self.times.clear()
        torch.use_deterministic_algorithms(deterministic and self.machine.device.type == "cpu", warn_only=True)

    def _result(self) -> float:
        first, last = self.times
        return 1000 * (last - first) / (self.steps - WARM)


def compare(bench: Bench, pairs: int) -> dict[str, float]:
    """Medians over pairs of blocks; which loop comes first alternates."""
    found: list[tuple[float, float]] = []
    loops: list[Callable[[], float]] = [bench.with_engine, bench.bare]
    for loop in loops:
        loop()
    for pair in range(pairs):
        if pair % 2:
            bare = bench.bare()
            found.append((bench.with_engine(), bare))
        else:
            found.append((bench.with_engine(), bench.bare()))
    engines, bares = zip(*found, strict=True)
    return {
        "engine_ms": statistics.median(engines),
        "bare_ms": statistics.median(bares),
        "added_ms": statistics.median(a - b for a, b in found),
        "overhead_percent": 100 * (statistics.median(a / b for a, b in found) - 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    results = {}
    print(f"{'':18}{'engine':>10}{'bare':>10}{'added':>10}{'overhead':>10}")
    for name in given.case or CASES:
        with tempfile.TemporaryDirectory() as folder:
            options = EngineOptions(device=given.device, threads=given.threads, channels_last="off")
            machine = Machine(options, Path(folder) / "tracking")
            machine.start_trackers(name)
            row = compare(Bench(CASES[name], machine, given.steps, Path(folder)), given.pairs)
            machine.stop_trackers()
        results[name] = row
        times = "".join(f"{row[key]:>7.2f} ms" for key in ("engine_ms", "bare_ms", "added_ms"))
        print(f"{name:18}{times}{row['overhead_percent']:>9.1f}%")
    if given.json:
        about = {"device": given.device, "threads": given.threads, "torch": torch.__version__}
        given.json.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
