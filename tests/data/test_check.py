"""What ``perdure check`` counts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perdure.data.catalog import open_source
from perdure.data.check import inspect
from perdure.errors import DataError, UsageError
from perdure.files import parse_yaml
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
    assert found.shared == {"train, test": {"00000": "00002"}}
    content = json.loads(json.dumps(found.to_dict()))
    assert content["kind"] == "classification" and content["shared"] == {"train, test": {"00000": "00002"}}


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
    assert (
        "1 image of test is also in train, pixel for pixel (00000 = train 00002)" in done.out
        and "background" not in done.out
    )
    assert "everything can be used" in done.out
    done = cli("check", "medmnist", tmp_path, "flag=bloodmnist")
    assert done.code == 1 and "bloodmnist.npz does not exist" in done.err and "own.npz" in done.err


def folders(root: Path, classes: str = "1 cat\n", names: str = "abcdef", values: tuple[int, ...] = (0, 1)) -> Path:
    """Images of 6 x 4 (width x height) whose masks show some numbers in equal shares."""
    for name in names:
        for part in ("images", "masks"):
            (root / part).mkdir(exist_ok=True)
        Image.new("RGB", (6, 4), (ord(name), 0, 0)).save(root / "images" / f"{name}.png")
        mask = np.resize(np.asarray(values, np.uint8), (4, 6))
        Image.fromarray(mask).save(root / "masks" / f"{name}.png")
    (root / "classes.txt").write_text(classes)
    return root


def test_every_problem_of_pairing_is_told_and_the_other_samples_are_read(tmp_path: Path) -> None:
    root = folders(tmp_path)
    Image.new("RGB", (6, 4)).save(root / "images" / "a.jpg")
    Image.new("L", (6, 4)).save(root / "masks" / "b.jpg")
    for gone in ("masks/b.png", "masks/c.png", "images/d.png"):
        (root / gone).unlink()
    (root / "masks" / "f.png").write_bytes(b"no image")
    source = open_source("folders", root, {"holdout": 2})
    found = inspect(source)
    told = [problem.what.replace(str(root), "") for problem in found.problems]
    assert told[:4] == [
        "/images holds both a.jpg and a.png",
        "/masks/b.jpg is a JPEG; masks must be PNG, BMP or TIFF",
        "image without mask: /images/c.png",
        "mask without image: /masks/d.png",
    ]
    assert len(told) == 5 and told[4].startswith("/masks/f.png is not a readable image")
    assert sum(report.readable for report in found.splits.values()) == 1
    with pytest.raises(DataError, match=r"holds both a.jpg and a.png \(and 3 more: `perdure check` names them\)"):
        source.names("train")  # a run is refused all the same


def test_problems_of_a_list_are_told_together(tmp_path: Path) -> None:
    root = folders(tmp_path)
    Image.new("L", (6, 4)).save(root / "masks" / "b.webp")
    (root / "masks" / "b.png").unlink()
    (root / "train.txt").write_text("a\nb\nx\na\nc.png\n")
    (root / "test.txt").write_text("d\n")
    found = inspect(open_source("folders", root))
    told = [problem.what.replace(str(root), "") for problem in found.problems]
    assert told == [
        "/masks/b.webp is a WEBP; masks must be PNG, BMP or TIFF",
        "/train.txt line 3 names a missing image: /images/x.png",
        "/train.txt line 4 lists 'a' a second time",
    ]
    assert (found.splits["train"].readable, found.splits["test"].readable) == (2, 1)


def test_a_class_that_is_not_listed_is_one_problem(tmp_path: Path) -> None:
    root = folders(tmp_path, values=(0, 1, 64, 128))
    found = inspect(open_source("folders", root, {"holdout": 2}))
    assert [p.what.split(" (first")[0] for p in found.problems] == [
        f"label {label} in 3 masks" for label in (64, 128, 64, 128)
    ]
    assert ["values={64: 1}" in found.problems[0].hint, "values={128: 1}" in found.problems[1].hint] == [True, True]
    assert found.problems[1].also == ("b", "d", "f")


COMMANDS = {
    # options -> exit code and words of the answer, for masks of 0, 128 and 255 where only 128 is a class
    "255 is a class that is not listed": ("holdout=2", 0, "255 is read as ignore in 6 images (33 % of pixels); if it"),
    "255 is meant": ("holdout=2 values={128: 128, 255: ignore}", 0, "everything can be used"),
    "no space after the colon": ("holdout=2 values={128:128,255:ignore}", 0, "everything can be used"),
    "a class by its name": ("holdout=2 values={128: cyto, 255: background}", 0, "everything can be used"),
    "a wrong name": ("holdout=2 values={128: cytoo}", 2, "values: 128 means 'cytoo', which is no class"),
    "width first": ("holdout=2", 0, "│ 6×4"),
    "holdout beside lists": ("holdout=5", 2, "holdout=5, but data has splits: train.txt, test.txt"),
    "no split": ("classes=data/classes.txt", 1, "does not say which images"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_what_the_command_says(case: str, tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    options, code, says = COMMANDS[case]
    (tmp_path / "data").mkdir()
    root = folders(tmp_path / "data", "128 cyto\n", values=(0, 128, 255))
    if "lists" in case:
        for split in ("train", "test"):
            (root / f"{split}.txt").write_text("a\n")
    monkeypatch.chdir(tmp_path)
    done = cli("check", "folders", "data", *re.split(r" (?=values)", options))
    assert done.code == code, done.err
    assert says in done.out + done.err
    assert ("read as ignore" in done.out) == ("values" not in options and code == 0)


def test_a_missing_space_in_a_recipe_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="write a space after each colon"):
        open_source("folders", folders(tmp_path), {"holdout": 2, "values": parse_yaml("{128:1,255:2}")})
