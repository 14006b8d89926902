"""Finished runs to look into."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXEMPLARS = '''\
"""Fine-tuning that keeps raw training images in a buffer."""

import torch

from perdure.engine.phases import Collect
from perdure.kept.items import Kept
from perdure.methods import training
from perdure.methods.finetune import Finetune


class Hoarder(Finetune):
    """Keeps the sum over the training images of each task, and the first image as it is."""

    def __init__(self, setup):
        super().__init__(setup)
        self.register_buffer("images", torch.zeros(0, 3, 32, 32))

    def phases(self, task):
        def data():
            return training.batches(task, self.training_options)

        def keep(totals):
            self.images = torch.cat([self.images, totals["images"][None].float()])

        def measure(batch):
            return {"images": batch.images[0]}

        return [*super().phases(task), Collect("hoard", self, data, measure, keep)]

    def kept(self):
        return [Kept("images", "exemplars", ("images",), "training images as they are")]
'''
RECIPE = """\
name: hoard
data: {name: folders, root: %s, holdout: 3}
stream: {base: 1, step: 1}
network: {backbone: tiny_resnet, tiny_channels: [4, 4, 4, 4], output_stride: 4, width: 8, dilations: [1]}
augment: {crop: 32}
evaluate: {size: null}
method: {name: hoarder:Hoarder}
training: {epochs: 1, batch_size: 4}
engine: {device: cpu, threads: 1, trackers: []}
report: {samples: 1}
"""


@pytest.fixture
def run(star_run: Path, tmp_path: Path) -> Path:
    """A finished run of STAR to spoil."""
    return Path(shutil.copytree(star_run, tmp_path / "run"))


@pytest.fixture
def hoard(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Train the method that keeps images; takes the further words of the command, gives the run's folder."""
    (tmp_path / "hoarder.py").write_text(EXEMPLARS)
    monkeypatch.syspath_prepend(tmp_path)
    data = tmp_path / "scans"
    for part in ("images", "masks"):
        (data / part).mkdir(parents=True)
    draw = np.random.Generator(np.random.PCG64(1))
    for k in range(9):
        Image.fromarray(draw.integers(0, 255, (32, 32, 3), np.uint8)).save(data / f"images/s{k}.png")
        Image.fromarray(np.repeat(np.arange(4, dtype=np.uint8) % 3, 8)[:, None].repeat(32, 1)).save(
            data / f"masks/s{k}.png"
        )
    (data / "classes.txt").write_text("1 liver\n2 spleen\n")
    (tmp_path / "hoard.yaml").write_text(RECIPE % data)

    def train(*words: str) -> Path:
        done = cli("run", tmp_path / "hoard.yaml", *words, "--out", tmp_path / "kept", "--quiet", "--allow-code")
        assert done.code == 0, done.err
        return tmp_path / "kept"

    return train
