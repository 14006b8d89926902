"""What `predict` and `--resume` check before they use a run folder: hashes, numbers, and the images of open tasks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from perdure.data.content import content_fingerprint
from perdure.data.dataset import Dataset
from perdure.data.preparation import Preparation
from perdure.data.readers.unlabelled import open_unlabelled
from perdure.kept.method_state import hash_of
from perdure.labels import label_space

RECIPE = """\
name: photos
data: {name: folders, root: %s, holdout: 4}
stream: {base: 1, step: 1, pool: folder, pool_folder: %s}
network: {backbone: tiny_resnet, tiny_channels: [4, 4, 4, 4], output_stride: 4, width: 8, dilations: [1]}
augment: {crop: 32}
evaluate: {size: null}
method: finetune
training: {epochs: 1, batch_size: 4}
engine: {device: cpu, threads: 1, trackers: []}
report: {samples: 0}
"""
LAST = "tasks/01-dog"


def picture(path: Path, seed: int) -> None:
    """Noise: pictures of all seeds have about the same size, and as BMP exactly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.Generator(np.random.PCG64(seed))
    Image.fromarray(draw.integers(0, 255, (32, 32, 3), np.uint8)).save(path)


def photographs(folder: Path) -> None:
    for k in range(12):
        picture(folder / f"photos/images/p{k}.bmp", k)
        mask = np.repeat(np.arange(4, dtype=np.uint8) % 3, 8)[:, None].repeat(32, 1)
        (folder / "photos/masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(folder / f"photos/masks/p{k}.png")
        picture(folder / f"pool/u{k}.bmp", 100 + k)
    (folder / "photos/classes.txt").write_text("1 cat\n2 dog\n")
    (folder / "photos.yaml").write_text(RECIPE % (folder / "photos", folder / "pool"))


@pytest.fixture(scope="module")
def template(cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs, a recipe, and its finished run."""
    folder = tmp_path_factory.mktemp("photos")
    photographs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERDURE_CACHE", str(folder / "cache"))
        done = cli("run", folder / "photos.yaml", "--out", folder / "run", "--quiet")
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def world(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rewrite) -> Path:
    """A copy in which the second task is open again."""
    world = Path(shutil.copytree(template, tmp_path / "world"))
    (world / "photos.yaml").write_text(RECIPE % (world / "photos", world / "pool"))
    monkeypatch.setenv("PERDURE_CACHE", str(world / "cache"))
    (world / "run" / LAST / "done").unlink()
    rewrite(world / "run")
    return world


def resume(world: Path, cli):
    return cli("run", world / "photos.yaml", "--out", world / "run", "--resume", "--quiet")


def edit(place: str, old: str, new: str) -> Callable[[Path], None]:
    def change(world: Path) -> None:
        text = (world / place).read_text()
        assert old in text
        (world / place).write_text(text.replace(old, new))

    return change


def flip(place: str) -> Callable[[Path], None]:
    def change(world: Path) -> None:
        content = bytearray((world / place).read_bytes())
        content[-1] ^= 1
        (world / place).write_bytes(bytes(content))

    return change


OPEN = "the run is not the same any more: "
CASES = {
    "image": (lambda w: picture(w / "photos/images/p3.bmp", 77), f"task 2 ('dog') of {OPEN}its training images have"),
    "larger-image": (lambda w: (w / "photos/images/p3.bmp").open("ab").write(b"x"), "images have other content"),
    "pool": (lambda w: picture(w / "pool/u5.bmp", 77), f"task 2 ('dog') of {OPEN}its unlabelled images have"),
    "weights": (flip("run/tasks/00-cat/weights.safetensors"), "is not what files.json says (hash differs)"),
    "patients": (
        edit("run/stream.json", '"patients": false', '"patients": true'),
        "the run has images of patients, the recipe",
    ),
    "recipe": (edit("run/recipe.yaml", "name: photos", "name: photos # Jane Doe"), "recipe.yaml: its content is not"),
    "ledger": (edit("run/tasks/00-cat/ledger.json", "training on", "trained on"), "ledger.json: its content is not"),
    "counts": (flip("run/tasks/00-cat/counts.json"), "counts.json: its content is not"),
    "log": (edit("run/log.jsonl", "loss", "lost"), "log.jsonl: its content is not"),
    "lost": (
        lambda w: (w / "run/tasks/00-cat/counts.json").unlink(),
        "counts.json: files.json lists it, but it is mis",
    ),
    "newer": (edit("run/tasks/00-cat/ledger.json", '"version": 3', '"version": 4'), "is of version 4"),
}


@pytest.mark.parametrize("name", CASES)
def test_resuming_refuses(name: str, world: Path, cli) -> None:
    change, told = CASES[name]
    change(world)
    before = {p: p.read_bytes() for p in (world / "run/tasks").rglob("*") if p.is_file()}
    done = resume(world, cli)
    assert (done.code, told in done.err) == (1, True), done.err
    assert {p: p.read_bytes() for p in (world / "run/tasks").rglob("*") if p.is_file()} == before


def test_resuming_goes_on_where_nothing_changed(world: Path, cli) -> None:
    """Dates do not count, nor pages, which are written again, nor images of no task."""
    for path in (world / "photos/images").iterdir():
        path.touch()
    (world / "run/report.html").unlink()
    (world / "run/MODEL_CARD.md").write_text("mine")
    done = resume(world, cli)
    assert done.code == 0, done.err
    assert cli("audit", world / "run").code == 0


def test_images_of_sealed_tasks_may_be_replaced(template: Path, tmp_path: Path, cli) -> None:
    world = Path(shutil.copytree(template, tmp_path / "world"))
    picture(world / "photos/images/p2.bmp", 77)
    (world / "photos.yaml").write_text(RECIPE % (world / "photos", world / "pool"))
    assert resume(world, cli).code == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_predict_nothing(value: float, template: Path, tmp_path: Path, cli) -> None:
    """Also where all hashes were renewed."""
    run = Path(shutil.copytree(template / "run", tmp_path / "run"))
    ledger = json.loads((run / LAST / "ledger.json").read_text())
    tensors = {name: t.clone() for name, t in load_file(run / LAST / "weights.safetensors").items()}
    for entry in ledger["items"][0]["tensors"]:
        if entry["file"] == f"{LAST}/weights.safetensors" and tensors[entry["name"]].is_floating_point():
            tensors[entry["name"]].fill_(value)
            entry["sha256"] = hash_of(tensors[entry["name"]])
    save_file(tensors, run / LAST / "weights.safetensors", {})
    (run / LAST / "ledger.json").write_text(json.dumps(ledger, indent=1) + "\n")
    done = cli("predict", run, "-i", template / "photos/images/p1.bmp", "-o", tmp_path / "out")
    assert (done.code, "is not finite" in done.err) == (1, True), done.err
    assert not (tmp_path / "out").exists()


def test_fingerprint_follows_content_alone(tmp_path: Path) -> None:
    photographs(tmp_path)
    space = label_space(["cat", "dog"])

    def fingerprint() -> str:
        source = open_unlabelled(tmp_path / "pool", "segmentation", space)
        names = tuple(source.names("train"))
        return content_fingerprint([Dataset(source, "train", names, np.zeros(4096, np.int16), Preparation())])

    first = fingerprint()
    (tmp_path / "pool/u1.bmp").touch()
    assert fingerprint() == first
    picture(tmp_path / "pool/u1.bmp", 7)
    assert fingerprint() != first
