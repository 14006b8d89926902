"""The script that brings DRIVE and WBC into the layout of the reader `folders`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perdure.data.catalog import open_source
from perdure.labels import IGNORE

SCRIPT = Path(__file__).parents[1] / "scripts" / "convert_fundus_and_cells.py"


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Both as they are published: pictures in .tif and .bmp, masks in .gif and .png."""
    draw = np.random.default_rng(0)
    for part, number in (("training", 21), ("test", 1)):
        drive = tmp_path / "in/fundus/DRIVE" / part
        suffix = f"{number:02}"
        mask = np.zeros((6, 5), np.uint8)
        mask[2, 1:4] = 255
        view = np.full((6, 5), 255, np.uint8)
        view[0] = 0
        picture = draw.integers(0, 256, (6, 5, 3), np.uint8)
        files = {
            f"images/{suffix}_{part}.tif": picture,
            f"1st_manual/{suffix}_manual1.gif": mask,
            f"mask/{suffix}_{part}_mask.gif": view,
        }
        for name, pixels in files.items():
            (drive / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(drive / name)
    for number in (1, 2):
        folder = tmp_path / f"in/wbc/Dataset {number}"
        folder.mkdir(parents=True)
        for k in range(1, 7):
            Image.fromarray(draw.integers(0, 256, (4, 4, 3), np.uint8)).save(folder / f"{k:03}.bmp")
            Image.fromarray(np.array([[0, 128, 255, 0]] * 4, np.uint8)).save(folder / f"{k:03}.png")
    return tmp_path / "in"


def convert(*words: Path | str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_both_are_read_as_folders(published: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = convert(published, out, "--tile", "2")
    assert (done.returncode, done.stderr) == (0, "")
    vessels, cells = (open_source("folders", out / name, {}) for name in ("vessels", "cells"))
    assert (vessels.names("train"), vessels.names("test")) == (("drive_21",), ("drive_01",))
    mask = vessels.mask("train", "drive_21")
    assert (mask[0] == IGNORE).all() and mask[2].tolist() == [0, 1, 1, 1, 0] and not mask[3:].any()
    with Image.open(published / "fundus/DRIVE/training/images/21_training.tif") as picture:
        np.testing.assert_array_equal(vessels.image("train", "drive_21"), np.asarray(picture).transpose(2, 0, 1))
    assert [cells.space.name(k) for k in cells.space.ids] == ["cytoplasm", "nucleus"]
    assert cells.names("test") == ("wbc1_001", "wbc1_006", "wbc2_001", "wbc2_006")
    assert len(cells.names("train")) == 8
    assert cells.mask("train", "wbc2_003")[0].tolist() == [0, 1, 2, 0]


def test_a_photograph_in_squares_is_one_case(published: Path, tmp_path: Path) -> None:
    """Two columns of three squares, without the row outside the field of view."""
    out = tmp_path / "out"
    assert convert(published, out, "--tile", "2").returncode == 0
    tiles = open_source("nnunet", out / "vessel_tiles", {})
    assert (tiles.names("train"), tiles.names("test")) == (("drive_21",), ("drive_01",))
    with Image.open(published / "fundus/DRIVE/training/images/21_training.tif") as picture:
        pixels = np.asarray(picture)
    image = tiles.image("train", "drive_21")
    assert image.shape == (3, 4, 2, 2)
    np.testing.assert_array_equal(image[:, 1], pixels[2:4, 2:4].transpose(2, 0, 1))
    assert tiles.mask("train", "drive_21").tolist() == [
        [[0, 1], [0, 0]],
        [[1, 1], [0, 0]],
        [[0, 0], [0, 0]],
        [[0, 0], [0, 0]],
    ]
    done = convert(published, tmp_path / "other", "--tile", "5")
    assert done.returncode == 1 and "no square of 5 pixels lies in the field of view" in done.stderr


def test_it_refuses_what_it_does_not_know(published: Path, tmp_path: Path) -> None:
    grey = published / "wbc/Dataset 2/004.png"
    Image.fromarray(np.full((4, 4), 77, np.uint8)).save(grey)
    done = convert(published, tmp_path / "out")
    assert done.returncode == 1 and f"{grey}: the mask holds 77; expected 0, 128 and 255" in done.stderr
    again = convert(published, tmp_path / "out")
    assert again.returncode == 1 and "is not empty: give a new folder" in again.stderr
    done = convert(tmp_path / "nothing", tmp_path / "other")
    assert done.returncode == 1 and "holds no *.tif" in done.stderr
