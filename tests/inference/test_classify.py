"""`perdure predict` with a model that sorts whole images: any image in, one table out."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from perdure.data.preparation import ClassImage
from perdure.data.readers.imagefiles import read_image
from perdure.data.readers.inputs import find_images
from perdure.data.readers.single_digits import open_single_digits
from perdure.errors import DataError, PerdureError
from perdure.outputs.images import table_names
from perdure.predict import Answer, Trained, classify_images, predict_files

GREY = """\
name: grey
data: {name: single_digits}
stream: {base: 5, step: 5, order: [nine, eight, seven, six, five, four, three, two, one, zero]}
network: {name: cosine_resnet, size: small}
augment: {crop: 32, flip: 0, mean: [0.2], std: [0.5]}
evaluate: {batch_size: 180}
method: finetune
training: {epochs: 1, batch_size: 64, lr: 0.1, later_lr: 0.1, freeze_norm: false}
engine: {device: cpu, threads: 1, trackers: []}
report: {samples: 0}
"""
COLOR = """\
name: color
data: {name: class_folders, root: %s}
stream: {base: 2, step: 1}
network: {name: cosine_resnet, size: small}
augment: {crop: 32, flip: 0, mean: [0, 0, 0], std: [1, 1, 1]}
method: finetune
training: {epochs: 1, batch_size: 4, freeze_norm: false}
engine: {device: cpu, threads: 1, trackers: []}
report: {samples: 0}
"""
CLASSES = ["=1+1", "@home", 'a, "b"']
"""Names of folders that a spreadsheet or a careless reader of tables stumbles over."""


class World(NamedTuple):
    """A finished run of grey and one of colour images."""

    grey: Path
    color: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, cli) -> World:
    folder = tmp_path_factory.mktemp("classified")
    draw = np.random.Generator(np.random.PCG64(0))
    for split in ("train", "test"):
        for name in CLASSES:
            (folder / "data" / split / name).mkdir(parents=True)
            for k in range(4):
                Image.fromarray(draw.integers(0, 255, (20, 20, 3), np.uint8)).save(
                    folder / "data" / split / name / f"{k}.png"
                )
    runs = World(folder / "grey", folder / "color")
    for run, text in zip(runs, (GREY, COLOR % (folder / "data")), strict=True):
        (folder / f"{run.name}.yaml").write_text(text)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PERDURE_CACHE", str(folder / "cache"))
            done = cli("run", folder / f"{run.name}.yaml", "--out", run, "--quiet")
        assert done.code == 0, done.err
    return runs


@pytest.fixture(scope="module")
def grey(world: World) -> Trained:
    return Trained.open(world.grey, "cpu")


@pytest.fixture(scope="module")
def color(world: World) -> Trained:
    return Trained.open(world.color, "cpu")


def square(side: int, mean: tuple[float, ...], std: tuple[float, ...], image: torch.Tensor) -> torch.Tensor:
    """An image as the model sees it, from a preparation made here and not from the run's own."""
    return ClassImage(channels=len(mean), patch=(side, side), mean=mean, std=std).normalised(image)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 255, (height, width, 3), np.uint8)


def save(path: Path, pixels: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo(28, 28) if pixels is None else pixels).save(path)
    return path


def read(table: Path) -> list[dict[str, str]]:
    with table.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def silent(done: int, of: int) -> None:
    pass


def below(folder: Path) -> Iterator[str]:
    return (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")))


def test_opens_as_what_it_is(grey: Trained, color: Trained) -> None:
    assert (grey.kind, color.kind) == ("classification", "classification")
    assert grey.seen == tuple(range(10, 0, -1))  # in learning order
    assert not grey.method.training  # type: ignore[attr-defined]
    assert [c["id"] for c in grey.classes()] == list(range(1, 11))  # no background
    assert [c["name"] for c in color.classes()] == CLASSES


def test_digits_get_the_scores_of_the_method(grey: Trained) -> None:
    """The reader of files and the reader of the data set show the network the same pixels."""
    source = open_single_digits()
    for name in source.names("test")[:6]:
        pixels = source.image("test", name)
        image = square(32, (0.2,), (0.5,), torch.from_numpy(pixels))
        with torch.no_grad():
            expected = grey.method.predict(image[None])
        found = grey.predict(np.repeat(pixels, 3, 0)).scores
        assert list(found) == list(expected.class_ids)
        assert list(found.values()) == expected.scores()[0].tolist()
        assert max(found, key=found.__getitem__) == int(expected.labels()[0])
        assert sum(found.values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("shape", [(32, 32), (28, 28), (31, 33), (1, 1), (5, 70), (64, 3), (97, 101)])
def test_any_size_is_shown_as_in_training(shape: tuple[int, int], color: Trained) -> None:
    image = photo(*shape)
    shown = square(32, (0.0,) * 3, (1.0,) * 3, torch.from_numpy(image.transpose(2, 0, 1).copy()))
    with torch.no_grad():
        expected = color.method.predict(shown[None])
    found = color.predict(image.transpose(2, 0, 1)).scores
    assert sorted(found) == [1, 2, 3]
    assert list(found.values()) == expected.scores()[0].tolist()


def test_grey_and_colour_both_ways(grey: Trained, color: Trained, tmp_path: Path) -> None:
    picture = Image.fromarray(photo(20, 20))
    files = {"rgb.png": picture, "grey.png": picture.convert("L"), "level.png": picture.convert("L").convert("RGB")}
    files["alpha.png"] = picture.convert("RGBA")  # nothing of it is transparent
    for name, kind in files.items():
        kind.save(tmp_path / name)
    for model in (grey, color):
        rows = {row.pop("file"): row for row in read(classify_images(model, [tmp_path], tmp_path / "out", silent))}
        assert rows.keys() == files.keys()
        assert rows["grey.png"] == rows["level.png"] and rows["alpha.png"] == rows["rgb.png"]
        assert (rows["rgb.png"] == rows["grey.png"]) == (model is grey)
    with torch.no_grad():
        luma = torch.from_numpy(np.asarray(picture.convert("L")).copy())[None]
        expected = grey.method.predict(square(32, (0.2,), (0.5,), luma)[None])
    assert list(grey.predict(read_image(tmp_path / "rgb.png")).scores.values()) == (expected.scores()[0].tolist())


def test_table(grey: Trained, tmp_path: Path) -> None:
    source = open_single_digits()
    for name in source.names("test")[:3]:
        save(tmp_path / "in" / f"{name}.png", source.image("test", name)[0])
    save(tmp_path / "in" / "1437.bmp")  # the stem of another file: there are no masks that could meet
    seen: list[tuple[int, int]] = []
    table = classify_images(grey, [tmp_path / "in"], tmp_path / "out", lambda *n: seen.append(n))
    assert seen == [(k, 4) for k in range(1, 5)]
    assert table == tmp_path / "out/predictions.csv"
    assert list(below(tmp_path / "out")) == ["classes.json", "predictions.csv"]
    assert json.loads((tmp_path / "out/classes.json").read_text()) == json.loads(json.dumps(grey.classes()))
    text = table.read_text(encoding="utf-8")
    chances = ",".join(f"p({grey.space.name(c)})" for c in range(1, 11))
    assert text.splitlines()[0] == f"file,class_id,class,probability,{chances}"
    assert text.endswith("\n") and "\r" not in text
    rows = read(table)
    assert [row["file"] for row in rows] == ["1437.bmp", "1437.png", "1438.png", "1439.png"]
    for row in rows:
        scores = grey.predict(read_image(tmp_path / "in" / row["file"])).scores
        best = max(scores, key=scores.__getitem__)
        assert (row["class_id"], row["class"]) == (str(best), grey.space.name(best))
        assert row["probability"] == row[f"p({row['class']})"] == f"{scores[best]:.6f}"
        for class_id, score in scores.items():
            assert row[f"p({grey.space.name(class_id)})"] == f"{score:.6f}"
    assert rows[0] == read(classify_images(grey, [tmp_path / "in/1437.bmp"], tmp_path / "one", silent))[0]


def test_no_cell_is_a_formula(color: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["+1.png", "-2.png", "@sum(a1).png", "=cmd|x.png", "a=b.png", 'läuft, "gut".png']
    for name in names:
        save(tmp_path / "in" / name)
    turn = count()
    answers = ({1: a, 2: b, 3: c} for a, b, c in np.eye(3)[[next(turn) % 3 for _ in names]].tolist())
    monkeypatch.setattr(Trained, "predict", lambda *_: Answer(np.zeros(()), np.zeros(()), next(answers)))
    rows = read(classify_images(color, [tmp_path / "in"], tmp_path / "out", silent))
    text = (tmp_path / "out/predictions.csv").read_text(encoding="utf-8")
    cells = [cell for line in csv.reader(text.splitlines(keepends=True)) for cell in line]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert {row["file"] for row in rows} == {n if n[0] in "al" else f"./{n}" for n in names}
    assert all((tmp_path / "in" / row["file"]).is_file() for row in rows)
    assert {row["class"] for row in rows} == {"'=1+1", "'@home", 'a, "b"'}
    assert {row["class_id"]: row["class"] for row in rows} == {"1": "'=1+1", "2": "'@home", "3": 'a, "b"'}
    assert [key for key in rows[0] if key.startswith("p(")] == [f"p({name})" for name in CLASSES]
    named = {c["id"]: c["name"] for c in json.loads((tmp_path / "out/classes.json").read_text())}
    assert [named[k] for k in (1, 2, 3)] == CLASSES  # there as they are


def test_files_are_named_from_the_folder_that_holds_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/1.png", "b/1.png", "b/c/-2.png"):
        save(tmp_path / name)
    assert table_names(find_images([Path("a")])) == ["1.png"]
    assert table_names(find_images([Path("a/1.png")])) == ["1.png"]
    assert table_names(find_images([Path("b"), Path("a")])) == ["b/1.png", "a/1.png"]
    assert table_names(find_images([Path("b/c"), tmp_path / "b"])) == ["c/-2.png", "1.png"]
    assert table_names(find_images([Path("b/c")])) == ["./-2.png"]


def test_the_same_file_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a/1.png")
    with pytest.raises(DataError, match=r"1\.png is given twice"):
        find_images([Path("a"), tmp_path / "a" / ".." / "a" / "1.png"])
    (tmp_path / "a" / "2.png").symlink_to(tmp_path / "a" / "1.png")  # a name of its own
    assert table_names(find_images([Path("a")])) == ["1.png", "2.png"]


def test_masks_of_one_name_are_refused_for_masks_only(grey: Trained, tmp_path: Path) -> None:
    files = [save(tmp_path / "a" / "1.png"), save(tmp_path / "a" / "1.bmp"), save(tmp_path / "b" / "1.png")]
    assert sorted(find_images([tmp_path / "a", tmp_path / "b"])) == sorted(files)
    with pytest.raises(DataError, match=r"1\.bmp and .*1\.png would both be written as 1\.png"):
        predict_files(grey, [tmp_path / "a"], tmp_path / "out", silent)  # told before the model is asked
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "shown"), [(b"bad\xff.png", r"bad\xff.png"), (b"\tx.png", r"\tx.png"), (b"one\ntwo.png", r"one\ntwo.png")]
)
def test_names_that_are_no_text(name: bytes, shown: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as told:
        table_names([tmp_path / "läuft.png", tmp_path / os.fsdecode(name)])
    assert told.value.what == f"the file name {shown} is not plain UTF-8 text"


@pytest.mark.parametrize("spoil", ["cut", "deep", "clear"])
def test_damaged_file_leaves_nothing(spoil: str, world: World, tmp_path: Path, cli) -> None:
    save(tmp_path / "in" / "a.png")
    last = save(tmp_path / "in" / "z.png")
    if spoil == "cut":
        last.write_bytes(last.read_bytes()[:200])
    elif spoil == "deep":
        Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(last)
    else:
        Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(last)
    done = cli("predict", world.grey, "-i", tmp_path / "in", "-o", tmp_path / "out", "--device", "cpu")
    assert done.code == 1 and done.out == ""
    assert done.err.startswith(f"error: {last} ") and len(done.err.splitlines()) == 2
    assert not (tmp_path / "out").exists()


def test_older_table_stays_whole_when_work_fails(grey: Trained, tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png")
    table = classify_images(grey, [tmp_path / "in"], tmp_path / "out", silent)
    before = table.read_bytes()
    (tmp_path / "in" / "b.png").write_bytes(b"x")
    with pytest.raises(DataError):
        classify_images(grey, [tmp_path / "in"], tmp_path / "out", silent)
    assert table.read_bytes() == before
    assert list(below(tmp_path / "out")) == ["classes.json", "predictions.csv"]


def test_place_of_the_table_is_looked_at_before_the_work(
    grey: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "in" / "a.png")
    (tmp_path / "file").write_text("x")
    asked: list[int] = []
    monkeypatch.setattr(Trained, "predict", lambda *_: asked.append(1))
    for out in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(PerdureError, match=r"could not write .*file"):
            classify_images(grey, [tmp_path / "in"], out, silent)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PerdureError, match=r"could not write .*new: Permission denied"):
        classify_images(grey, [tmp_path / "in"], tmp_path / "new" / "new", silent)
    assert not asked


def test_folders_without_images_or_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty" / "inside").mkdir(parents=True)
    (tmp_path / "empty" / ".hidden.png").write_bytes(b"")
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"no images found in .*empty\nlooked for .jpg"):
        find_images([tmp_path / "empty"])
    with pytest.raises(DataError, match="no images found in 2 folders"):
        find_images([tmp_path / "empty", tmp_path / "empty"])
    with pytest.raises(DataError, match="nothing does not exist"):
        find_images([tmp_path / "nothing"])

    def closed(self: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", closed)
    with pytest.raises(DataError, match="empty cannot be read: Permission denied"):
        find_images([tmp_path / "empty"])


def test_command(world: World, tmp_path: Path, cli) -> None:
    save(tmp_path / "in" / "a.png")
    save(tmp_path / "in" / "a.jpg")
    words = ["predict", world.grey, "-i", tmp_path / "in", "-o", tmp_path / "out", "--device"]
    done = cli(*words, "cpu")
    table = tmp_path / "out" / "predictions.csv"
    assert (done.code, done.out) == (0, "")
    assert done.err == f"2 image(s) classified into 10 classes -> {table}\n"
    assert len(read(table)) == 2
    assert cli(*words, "gpu").code == 2
    (tmp_path / "none").mkdir()
    done = cli("predict", world.grey, "-i", tmp_path / "none", "-o", tmp_path / "other")
    assert done.code == 1 and "no images found in" in done.err
    assert not (tmp_path / "other").exists()


def test_run_that_is_sealed_so_far(world: World, tmp_path: Path) -> None:
    run = Path(shutil.copytree(world.grey, tmp_path / "run"))
    second = sorted((run / "tasks").iterdir())[1]
    (second / "done").unlink()
    table = classify_images(Trained.open(run, "cpu"), [save(tmp_path / "x.png")], tmp_path / "out", silent)
    assert list(read(table)[0])[4:] == [f"p({name})" for name in ("five", "six", "seven", "eight", "nine")]


def test_run_of_before_there_were_kinds_segments(star_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(star_run, tmp_path / "run"))
    described = json.loads((run / "stream.json").read_text())
    assert described.pop("kind") == "segmentation"
    (run / "stream.json").write_text(json.dumps(described))
    assert Trained.open(run, "cpu").kind == "segmentation"
