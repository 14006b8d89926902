"""A folder of images without labels."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pil

from perdure.data.readers.unlabelled import open_unlabelled
from perdure.data.source import AbsentSplitError, Source
from perdure.errors import DataError
from perdure.labels import IGNORE, label_space

SPACE = label_space(["cat", "dog"], background=None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "more").mkdir()
    for name, value in (("b.png", 10), ("more/a.png", 200)):
        Pil.new("RGB", (6, 4), (value, 0, 0)).save(tmp_path / name)
    for name in ("notes.txt", "._b.png"):  # the second as macOS leaves them beside files
        (tmp_path / name).write_text("no image")
    return tmp_path


def test_all_images_are_there_and_nothing_is_known_of_them(folder: Path) -> None:
    source = open_unlabelled(folder, "classification", SPACE)
    assert isinstance(source, Source) and source.patients
    assert source.names("train") == ("b.png", "more/a.png")
    image = source.image("train", "more/a.png")
    assert image.shape == (3, 4, 6) and image[:, 0, 0].tolist() == [200, 0, 0]
    assert source.mask("train", "b.png").shape == () and source.mask("train", "b.png") == IGNORE


def test_pixels_of_a_segmentation_pool_say_ignore(folder: Path) -> None:
    mask = open_unlabelled(folder, "segmentation", SPACE).mask("train", "b.png")
    assert mask.shape == (4, 6) and set(mask.ravel().tolist()) == {IGNORE}


def test_grey_beside_grey_data(folder: Path) -> None:
    image = open_unlabelled(folder, "classification", SPACE, 1).image("train", "more/a.png")
    assert image.shape == (1, 4, 6) and np.unique(image).tolist() == [60]  # 0.299 of 200, rounded


def test_fingerprint_follows_the_names(folder: Path) -> None:
    before = open_unlabelled(folder, "classification", SPACE).fingerprint("train")
    assert before == open_unlabelled(folder, "segmentation", SPACE).fingerprint("train")
    (folder / "b.png").rename(folder / "c.png")
    assert before != open_unlabelled(folder, "classification", SPACE).fingerprint("train")


def test_what_is_not_there_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'none'} is no folder")):
        open_unlabelled(tmp_path / "none", "classification", SPACE)
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        open_unlabelled(tmp_path / "bare", "classification", SPACE)
    source = open_unlabelled(folder, "classification", SPACE)
    with pytest.raises(AbsentSplitError, match="no split 'test'"):
        source.names("test")
    with pytest.raises(DataError, match=r"no sample 'x\.png'"):
        source.image("train", "x.png")
