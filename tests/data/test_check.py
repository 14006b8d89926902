"""What ``perdure check`` counts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perdure.data.catalog import open_source
from perdure.data.check import inspect
from perdure.labels import IGNORE


def test_counts_sizes_and_empty_masks(tmp_path: Path) -> None:
    for name, shape, fill in (("a", (4, 6), 1), ("b", (8, 5), 0), ("c", (3, 3), 2)):
        for folder in ("images", "masks"):
            (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("RGB", shape[::-1]).save(tmp_path / "images" / f"{name}.png")
        pixels = np.full(shape, fill, np.uint8)
        pixels[0, 0] = 255
        Image.fromarray(pixels).save(tmp_path / "masks" / f"{name}.png")
    (tmp_path / "classes.txt").write_text("1 cat\n2 dog\n3 elk\n")
    (tmp_path / "train.txt").write_text("a\nb\nc\n")
    found = inspect(open_source("folders", tmp_path), ("train", "val"))
    report = found.splits["train"]
    assert found.ok
    assert list(found.absent) == ["val"]
    assert (report.samples, report.readable, report.empty) == (3, 3, ("b",))
    assert (report.smallest, report.largest) == ((3, 3), (8, 5))
    assert report.images == {0: 1, 1: 1, 2: 1, 3: 0, IGNORE: 3}
    assert report.pixels == {0: 39, 1: 23, 2: 8, 3: 0, IGNORE: 3}
    assert found.unused("train") == ("elk",)
    assert json.loads(json.dumps(found.to_dict()))["splits"]["train"]["pixels"]["1"] == 23


def test_nothing_readable_is_not_fine(tmp_path: Path) -> None:
    for folder in ("images", "annotations"):
        (tmp_path / folder).mkdir()
    found = inspect(open_source("ade20k", tmp_path))
    assert list(found.absent) == ["train", "val", "test"]
    assert not found.ok


def npz(folder: Path) -> Path:
    images = np.arange(7, dtype=np.uint8)[:, None, None] * np.ones((7, 4, 4), np.uint8)
    labels = np.array([0, 1, 1, 0, 2, 1, 0])
    np.savez(
        folder / "own.npz",
        train_images=images[[0, 1, 2, 2]], train_labels=labels[:4], test_images=images[2:], test_labels=labels[2:],
    )  # fmt: skip
    return folder


def test_one_class_an_image(tmp_path: Path) -> None:
    found = inspect(open_source("medmnist", npz(tmp_path), {"file": "own.npz"}))
    assert found.ok and found.kind == "classification"
    assert found.classes == {1: "class 0", 2: "class 1", 3: "class 2"}
    report = found.splits["train"]
    assert (report.images, report.pixels, report.empty, report.repeated) == ({1: 2, 2: 2, 3: 0}, {}, (), 1)
    assert found.unused("train") == ("class 2",)
    assert found.shared == {"train, test": ("00000",)}
    content = json.loads(json.dumps(found.to_dict()))
    assert content["kind"] == "classification" and content["shared"] == {"train, test": ["00000"]}


def test_a_label_that_is_no_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source("medmnist", npz(tmp_path), {"file": "own.npz"})
    source.ids["train"][2] = 0
    found = inspect(source)
    assert [(p.name, p.what) for p in found.problems] == [("00002", "own: '00002' has label 0, which is no class")]
    monkeypatch.setattr(type(source), "mask", lambda *_: np.ones((4, 4), np.uint8))
    assert inspect(source, limit=0).hidden == 9


def test_the_command_counts_images_of_classes_and_no_pixels(tmp_path: Path, cli) -> None:
    done = cli("check", "medmnist", npz(tmp_path), "file=own.npz", "classes=[a, b, c]")
    assert done.code == 0 and "train: images" in done.out and "pixels" not in done.out
    assert "1 image of test is also in train, pixel for pixel (00000)" in done.out and "background" not in done.out
    assert "everything can be used" in done.out
    done = cli("check", "medmnist", tmp_path, "flag=bloodmnist")
    assert done.code == 1 and "bloodmnist.npz does not exist" in done.err and "own.npz" in done.err
