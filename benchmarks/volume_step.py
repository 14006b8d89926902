"""Time of a training step on volumes, against nnU-Net's own trainer: same network, patch, batch and cases.

    python benchmarks/volume_step.py [--steps 8] [--pairs 3] [--patch 32 48 48] [--json FILE]

The cases are phantoms of a torso, prepared once by nnU-Net's preprocessing, and written by each side in its own way.
One residual U-Net with four channels goes to both. Perdure's side is a step of its engine with the method finetune
(binary cross-entropy of each class); nnU-Net's is ``train_step`` of its trainer (softmax, Dice and cross-entropy), fed
by its own data loader in the same process, without deep supervision, because the network has one output. Both augment
as nnU-Net does and use SGD with Nesterov momentum and clipped gradients. Blocks of steps run in turn; times are of the
processor, one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from perdure.data.case import Batch, collate
from perdure.data.dataset import Dataset
from perdure.data.readers.phantoms import Phantoms, open_phantoms
from perdure.data.sampling import Batches, BatchSampler
from perdure.data.volumes.extra import need, nnunet_folders, quiet
from perdure.data.volumes.options import VolumeOptions
from perdure.data.volumes.plan import plan_volumes
from perdure.data.volumes.preprocessing import Volume3D
from perdure.data.volumes.working import prepare_working_files
from perdure.engine.checkpoint import Checkpoint, Position
from perdure.engine.engine import Engine
from perdure.engine.loader import read_draws
from perdure.engine.machine import Machine
from perdure.engine.options import EngineOptions
from perdure.engine.phases import Train
from perdure.engine.run_logger import RunLogger
from perdure.labels import TABLE_SIZE
from perdure.methods.finetune import Finetune
from perdure.methods.options import Setup, TrainingOptions
from perdure.methods.training import make_optimizer
from perdure.networks.build import build_network
from perdure.networks.segmenter import Segmenter
from perdure.streams.task import Task

WARM, BATCH, CASES, CHANNELS = 2, 2, 6, 4
WIDTHS = (16, 32, 64)


def same_network() -> Segmenter:
    """The network of both sides, with the weights of one seed."""
    torch.manual_seed(0)
    network = build_network("residual_unet", 3, 1, widths=list(WIDTHS))
    assert isinstance(network, Segmenter)
    return network


class Ours:
    """Perdure's engine with working files."""

    def __init__(self, source: Phantoms, plan: Volume3D, folder: Path) -> None:
        names = tuple(source.names("train"))
        working = prepare_working_files(source, "train", names, plan, folder / "working", content="known")
        table = np.arange(TABLE_SIZE, dtype=np.int16)
        self.data = Dataset(source, "train", names, table, plan, training=True, working=working)
        self.training = TrainingOptions(batch_size=BATCH, lr=0.01, momentum=0.99, weight_decay=3e-5, clip=12)
        self.method = Finetune(Setup(Finetune.Options(), self.training, same_network))
        classes = tuple(range(1, CHANNELS + 1))
        self.method.begin(Task(0, "all", classes, (), frozenset(classes)))
        options = EngineOptions(device="cpu", threads=1, trackers=())
        self.machine = Machine(options, folder / "tracking")
        logger = RunLogger(self.machine, folder / "log.jsonl", quiet=True)
        self.engine = Engine(self.machine, options, 0, Checkpoint(folder / "resume", self.machine, 1e9), logger)
        self.read = 0

    def batches(self, steps: int) -> float:
        """Seconds per step of cutting, augmenting and stacking samples."""
        draws = BatchSampler(Batches(self.data, BATCH), 0, self.read, self.read + WARM + steps)
        self.read += WARM + steps  # other samples in every block, as on the other side
        reads = read_draws(draws, collate, 0)
        for _ in range(WARM):
            next(reads)
        begun = time.process_time()
        found: list[Batch | None] = list(reads)
        assert len(found) == steps
        return (time.process_time() - begun) / steps

    def whole(self, steps: int) -> float:
        """Seconds per step of the engine, its data included."""
        marks: dict[int, float] = {}
        phase = Train(
            name="train",
            module=self.method,
            loss=self.method.loss,
            optimizer=lambda: make_optimizer(self.method.network, self.training, later=False),
            data=lambda: Batches(self.data, BATCH),
            steps=WARM + steps,
            clip=self.training.clip,
            after_step=lambda step: marks.update({step + 1: time.process_time()}),
        )
        self.engine.run(self.method, [phase], 0, Position())
        return (marks[WARM + steps] - marks[WARM]) / steps


class Theirs:
    """nnU-Net's trainer with its own files and data loader."""

    def __init__(self, source: Phantoms, plan: Volume3D, folder: Path) -> None:
        trainer = need("nnunetv2.training.nnUNetTrainer.nnUNetTrainer").nnUNetTrainer
        stored = need("nnunetv2.training.dataloading.nnunet_dataset")
        place = folder / "Dataset001_Made" / "made"
        place.mkdir(parents=True)
        for name in source.names("train"):
            case = source.read("train", name)
            data, label, found = plan._run(case, case.label.numpy().astype(np.int16))
            blocks, chunks = stored.comp_blosc2_params(data.shape, plan.patch, data.itemsize)
            stored.nnUNetDatasetBlosc2.save_case(data, label, found, str(place / name), chunks, blocks)
        plans = plan.nnunet_plans()
        plans |= {"dataset_name": "Dataset001_Made", "plans_name": "nnUNetPlans", "continue_training": False}
        plans["configurations"]["3d_fullres"] |= {"batch_size": BATCH, "batch_dice": False, "data_identifier": "made"}
        # background and three classes: as many channels as the other side has
        labels = {"background": 0, **{known.name: known.id for known in source.space.classes[: CHANNELS - 1]}}
        declared = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": CASES, "file_ending": ".nii.gz"}

        class Logits(nn.Module):
            """The network with one more classifier; its features are of no use to this trainer."""

            def __init__(self) -> None:
                super().__init__()
                self.network = same_network()
                self.network.grow(CHANNELS)

            def forward(self, images: Tensor) -> Tensor:
                return self.network.classify(self.network.features(images))

        class Trainer(trainer):  # type: ignore[misc, valid-type]
            """The trainer as it is, with our network."""

            build_network_architecture = staticmethod(
                lambda plans_manager, configuration_manager, channels, heads, deep: Logits()  # noqa: ARG005
            )

        with quiet():
            self.trainer = Trainer(plans, "3d_fullres", "all", declared, torch.device("cpu"))
            self.trainer.enable_deep_supervision = False
            self.trainer.initialize()
            self.loader, _ = self.trainer.get_dataloaders()
        self.trainer.network.train()

    def batches(self, steps: int) -> float:
        """Seconds per step of its data loader."""
        for _ in range(WARM):
            next(self.loader)
        begun = time.process_time()
        for _ in range(steps):
            next(self.loader)
        return (time.process_time() - begun) / steps

    def whole(self, steps: int) -> float:
        """Seconds per step of data loader and trainer."""
        for _ in range(WARM):
            self.trainer.train_step(next(self.loader))
        begun = time.process_time()
        for _ in range(steps):
            self.trainer.train_step(next(self.loader))
        return (time.process_time() - begun) / steps


def measure(patch: tuple[int, int, int], steps: int, pairs: int) -> dict[str, list[float]]:
    """Seconds per step, one entry per repeat."""
    source = open_phantoms("torso", "organs", train=CASES, test=0, size=64)
    options = VolumeOptions(plan="given", spacing=(6, 5, 5), patch=patch, normalisation="ct", augment="nnunet")
    plan = plan_volumes(source, options)
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name, nnunet_folders(Path(name)):
        os.environ |= {"nnUNet_results": name, "nnUNet_n_proc_DA": "0", "nnUNet_compile": "f"}
        ours, theirs = Ours(source, plan, Path(name)), Theirs(source, plan, Path(name))
        ways: dict[str, Callable[[int], float]] = {
            "Perdure, data": ours.batches,
            "nnU-Net, data": theirs.batches,
            "Perdure, whole": ours.whole,
            "nnU-Net, whole": theirs.whole,
        }
        for _ in range(pairs):
            for what, way in ways.items():
                times.setdefault(what, []).append(way(steps))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--patch", type=int, nargs=3, default=(32, 48, 48))
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    times = measure(tuple(asked.patch), asked.steps, asked.pairs)
    middle: dict[str, float] = {what: 1000 * statistics.median(found) for what, found in times.items()}
    for side in ("Perdure", "nnU-Net"):
        middle[f"{side}, step"] = middle[f"{side}, whole"] - middle[f"{side}, data"]
    print(f"{'ms per step':12}{'Perdure':>10}{'nnU-Net':>10}{'ratio':>8}")
    for part in ("data", "step", "whole"):
        first, second = middle[f"Perdure, {part}"], middle[f"nnU-Net, {part}"]
        print(f"{part:12}{first:>10.1f}{second:>10.1f}{first / second:>8.2f}")
    if asked.json:
        found: dict[str, Any] = {"patch": asked.patch, "batch": BATCH, "times": times}
        asked.json.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
