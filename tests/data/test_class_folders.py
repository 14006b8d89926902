"""Images in one folder a class."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perdure.data.catalog import open_source
from perdure.data.check import inspect
from perdure.data.readers.class_folders import open_class_folders
from perdure.data.source import AbsentSplitError, Source
from perdure.errors import DataError, UsageError
from perdure.streams.lists import label_presence


def picture(path: Path, color: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (6, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def folders(root: Path) -> Path:
    picture(root / "train" / "cat" / "b.png", (255, 0, 0))
    picture(root / "train" / "cat" / "a.png", (0, 255, 0))
    picture(root / "train" / "ant" / "a.png", (0, 0, 255))
    picture(root / "train" / "ant" / "a.bmp", (1, 2, 3))  # another image than a.png
    picture(root / "test" / "cat" / "z.tif", size=(9, 7))
    (root / "train" / ".cache").mkdir()
    (root / "train" / "notes.txt").write_text("not an image")
    (root / "test" / "cat" / "about.txt").write_text("not an image")
    return root


def test_folders_are_classes(tmp_path: Path) -> None:
    source = open_source("class_folders", folders(tmp_path))
    assert isinstance(source, Source)
    assert (source.kind, source.patients, source.other_label) == ("classification", False, 0)
    assert [(c.id, c.name) for c in source.space.classes] == [(1, "ant"), (2, "cat")]
    assert source.space.background is None
    assert source.names("train") == ("ant/a.bmp", "ant/a.png", "cat/a.png", "cat/b.png")
    labels = [source.mask("train", name) for name in source.names("train")]
    assert [int(label) for label in labels] == [1, 1, 2, 2]
    assert {(label.shape, label.dtype) for label in labels} == {((), np.dtype(np.int16))}
    image = source.image("train", "cat/b.png")
    assert (image.shape, image.dtype) == ((3, 4, 6), np.uint8) and image[:, 0, 0].tolist() == [255, 0, 0]
    assert source.image("test", "cat/z.tif").shape == (3, 7, 9)
    with pytest.raises(AbsentSplitError, match="split 'val' is absent"):
        source.names("val")
    for name in ("cat/c.png", "cat", "../train/cat/a.png"):
        with pytest.raises(DataError, match="no sample"):
            source.image("train", name)


def test_grey_and_patients(tmp_path: Path) -> None:
    source = open_source("class_folders", folders(tmp_path), {"channels": 1, "patients": True})
    image = source.image("train", "cat/b.png")
    assert image.shape == (1, 4, 6) and set(image.ravel().tolist()) == {76}  # 0.299 of full red
    assert source.patients
    with pytest.raises(UsageError, match="option 'channels'"):
        open_source("class_folders", tmp_path, {"channels": 2})


def test_presence_fingerprint_and_pickling_read_no_image(tmp_path: Path) -> None:
    source = pickle.loads(pickle.dumps(open_class_folders(folders(tmp_path))))
    first = source.fingerprint("train")
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"not an image")
    found = label_presence(source, "train")
    assert [np.flatnonzero(row).tolist() for row in found] == [[1], [1], [2], [2]]
    assert source.distinct_labels("train", "cat/b.png").tolist() == [2]
    (tmp_path / "train" / "cat" / "b.png").rename(tmp_path / "train" / "ant" / "b.png")
    assert open_class_folders(tmp_path).fingerprint("train") != first


def test_order_of_a_class_list(tmp_path: Path) -> None:
    folders(tmp_path)
    listed = tmp_path / "classes.txt"
    listed.write_text("# learning order\ncat\n\nant\n")
    source = open_class_folders(tmp_path)
    assert [(c.id, c.name) for c in source.space.classes] == [(1, "cat"), (2, "ant")]
    assert source.names("train")[0] == "cat/a.png" and int(source.mask("train", "cat/a.png")) == 1
    for text, message in (
        ("cat\nant\ndog\n", "names 'dog', but train has no such folder"),
        ("cat\n", "lacks the folder train/ant"),
        ("cat\nant\ncat\n", "names 'cat' twice"),
        ("", "lacks the folder train/ant"),
    ):
        listed.write_text(text)
        with pytest.raises(DataError, match=message):
            open_class_folders(tmp_path)
    listed.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"classes\.txt cannot be read"):
        open_class_folders(tmp_path)


def test_a_class_called_background_is_a_class(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "background" / "a.png")
    picture(tmp_path / "train" / "tumour" / "a.png")
    (tmp_path / "classes.txt").write_text("background\ntumour\n")
    source = open_class_folders(tmp_path)
    assert [(c.id, c.name) for c in source.space.classes] == [(1, "background"), (2, "tumour")]


def test_a_test_class_that_train_lacks_is_named(tmp_path: Path) -> None:
    picture(folders(tmp_path) / "test" / "cats" / "a.png")
    source = open_class_folders(tmp_path)
    with pytest.raises(DataError, match="cats is a class that train lacks") as error:
        source.names("test")
    assert "did you mean 'cat'" in error.value.hint
    found = inspect(source)
    assert not found.ok and "cats is a class that train lacks" in found.problems[0].what


def test_wrong_layouts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no folder train \(folders: none\)"):
        open_class_folders(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match=r"has no folder train \(folders: cat\)"):
        open_class_folders(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="train has no class folder"):
        open_class_folders(tmp_path)
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(DataError, match="train holds no image"):
        open_class_folders(tmp_path)
    (tmp_path / "train" / "dog").mkdir()
    picture(tmp_path / "train" / "dog" / "a.png")
    with pytest.raises(DataError, match="cat holds no image"):
        open_class_folders(tmp_path)
    picture(tmp_path / "train" / "cat" / "more" / "a.png")
    with pytest.raises(DataError, match="more is a folder inside a class folder"):
        open_class_folders(tmp_path)
    (tmp_path / "train" / "cat" / "more").rename(tmp_path / "train" / "elk")
    (tmp_path / "train" / "cat").rmdir()
    picture(tmp_path / "train" / "stray.jpg")
    with pytest.raises(DataError, match=r"stray\.jpg lies beside the class folders"):
        open_class_folders(tmp_path)


def test_check_finds_damaged_and_repeated_images(tmp_path: Path) -> None:
    root = folders(tmp_path)
    picture(root / "train" / "cat" / "twin.png", (255, 0, 0))  # as b.png
    picture(root / "test" / "ant" / "leak.png", (0, 0, 255))  # as train/ant/a.png
    (root / "test" / "ant" / "bad.png").write_bytes(b"\x89PNG\r\n")
    found = inspect(open_class_folders(root))
    assert not found.ok and found.kind == "classification"
    assert [(p.split, p.name) for p in found.problems] == [("test", "ant/bad.png")]
    train, test = found.splits["train"], found.splits["test"]
    assert (train.samples, train.images, train.pixels, train.repeated) == (5, {1: 2, 2: 3}, {}, 1)
    assert (test.samples, test.readable, test.images, test.repeated) == (3, 2, {1: 1, 2: 1}, 0)
    assert (test.smallest, test.largest) == ((4, 6), (7, 9))
    assert {pair: len(names) for pair, names in found.shared.items()} == {"train, test": 1}


@pytest.mark.real
def test_white_blood_cells(shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / "wbc"
    with (root / "Class Labels of Dataset 1.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        file = root / "Dataset 1" / f"{int(row['image ID']):03d}.bmp"
        folder = tmp_path / ("test" if int(row["image ID"]) % 4 == 0 else "train") / f"kind {row['class label']}"
        if file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / file.name).symlink_to(file)
    found = inspect(open_class_folders(tmp_path, patients=True))
    assert found.ok and len(found.classes) >= 4
    assert found.splits["train"].readable + found.splits["test"].readable == 200
