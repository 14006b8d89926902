"""What ``perdure check`` counts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from perdure.data.catalog import open_source
from perdure.data.check import inspect


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
    assert report.images == {0: 1, 1: 1, 2: 1, 3: 0, 255: 3}
    assert report.pixels == {0: 39, 1: 23, 2: 8, 3: 0, 255: 3}
    assert found.unused("train") == ("elk",)
    assert json.loads(json.dumps(found.to_dict()))["splits"]["train"]["pixels"]["1"] == 23


def test_nothing_readable_is_not_fine(tmp_path: Path) -> None:
    for folder in ("images", "annotations"):
        (tmp_path / folder).mkdir()
    found = inspect(open_source("ade20k", tmp_path))
    assert list(found.absent) == ["train", "val", "test"]
    assert not found.ok
