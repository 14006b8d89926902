"""A folder to work in: a recipe, photographs with masks, and a recipe for them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PHOTOS = """\
name: photos
seed: 1
data: {name: folders, root: photos}
stream: {base: 2, step: 1}
network: {backbone: tiny_resnet, tiny_channels: [4, 4, 4, 4], output_stride: 4, width: 8, dilations: [1]}
augment: {crop: 32}
evaluate: {size: null}
method: finetune
training: {epochs: 1, batch_size: 4}
engine: {device: cpu, threads: 1, trackers: []}
report: {samples: 1}
"""
NAMES = [f"p{k}" for k in range(8)]


def save(path: Path, pixels: np.ndarray) -> None:
    """Write an image, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Path:
    """The folder as each test finds it. Photographs are 36 x 40; classes 1 to 4 are in every one of them."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "tiny.yaml").write_text(tiny)
    (folder / "photos.yaml").write_text(PHOTOS)
    draw = np.random.Generator(np.random.PCG64(0))
    for name in NAMES:
        mask = np.kron(draw.permutation([0, 1, 2, 3, 4, 255]).reshape(2, 3), np.ones((18, 14)))[:, :40]
        save(folder / "photos" / "masks" / f"{name}.png", mask.astype(np.uint8))
        save(folder / "photos" / "images" / f"{name}.png", draw.integers(0, 255, (36, 40, 3), np.uint8))
    (folder / "photos" / "classes.txt").write_text("1 cat\n2 dog\n3 tree\n4 house\n")
    (folder / "photos" / "train.txt").write_text("\n".join(NAMES[:5]))
    (folder / "photos" / "test.txt").write_text("\n".join(NAMES[5:]))
    return folder


@pytest.fixture
def world(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the template, as the current folder."""
    folder = tmp_path / "world"
    shutil.copytree(template, folder)
    monkeypatch.chdir(folder)
    return folder
