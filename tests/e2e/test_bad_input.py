"""Whatever is wrong with the input: an exit code, one or two plain lines, and nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

USAGE, FAILED = 2, 1
Prepare = Callable[[Path], object]


class Case(NamedTuple):
    """A command in the world of ``conftest.py``, what it exits with, and words its message must have.

    ``prepare`` spoils the world first. A folder ``run`` is there only if ``prepare`` makes it.
    """

    command: str
    code: int
    says: tuple[str, ...]
    prepare: Prepare | None = None


def text(path: str, content: str | bytes) -> Prepare:
    """Write a file."""
    return lambda world: (world / path).write_bytes(content if isinstance(content, bytes) else content.encode())


def gone(path: str) -> Prepare:
    """Remove a file."""
    return lambda world: (world / path).unlink()


def picture(path: str, pixels: np.ndarray, mode: str | None = None) -> Prepare:
    """Write an image."""
    image = Image.fromarray(pixels)
    return lambda world: (image if mode is None else image.convert(mode)).save(world / path)


def cut(path: str, share: float = 0.5) -> Prepare:
    """Cut a file off."""

    def prepare(world: Path) -> None:
        content = (world / path).read_bytes()
        (world / path).write_bytes(content[: int(len(content) * share)])

    return prepare


def jpeg_cut_off(world: Path) -> None:
    """Replace a training photograph by a JPEG file that ends too early."""
    (world / "photos/images/p1.png").unlink()
    Image.fromarray(np.full((36, 40, 3), 90, np.uint8)).save(world / "photos/images/p1.jpg")
    cut("photos/images/p1.jpg")(world)


def copied_run(*then: Prepare) -> Prepare:
    """Put a finished run at ``run`` and spoil it."""

    def prepare(world: Path) -> None:
        shutil.copytree(world.parent / "finished", world / "run")
        for step in then:
            step(world)

    return prepare


def without_sealed_task(world: Path) -> None:
    """Leave of a run what is there before its first task is sealed."""
    copied_run()(world)
    shutil.rmtree(world / "run/tasks")


def other_stream(world: Path) -> None:
    """Two runs of different streams."""
    copied_run()(world)
    shutil.copytree(world / "run", world / "other")
    path = world / "other/stream.json"
    path.write_text(path.read_text().replace('"dataset": "digits"', '"dataset": "voc"'))


def resnet_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Prepare:
    """Write ``w.safetensors`` as the tiny backbone wants it, then spoilt by ``change``."""

    def prepare(world: Path) -> None:
        from perdure.networks.build import build_network

        network = build_network("deeplab", 2, 3, backbone="tiny_resnet", tiny_channels=[4, 4, 4, 4], output_stride=4)
        tensors = {k: v.contiguous() for k, v in network.body.get_submodule("backbone").state_dict().items()}
        change(tensors)
        save_file(tensors, world / "w.safetensors")

    return prepare


class Bomb:
    """Makes a folder where it is unpickled carelessly."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


def bomb(world: Path) -> None:
    """A weights file of torch with code in it."""
    torch.save({"conv1.weight": Bomb()}, world / "w.pth")


def bare_bomb(world: Path) -> None:
    """A weights file that is nothing but a pickle with code in it."""
    (world / "w.pth").write_bytes(pickle.dumps({"conv1.weight": Bomb()}))


def flipped(path: str) -> Prepare:
    """Change one bit in the last byte of a file."""

    def prepare(world: Path) -> None:
        content = bytearray((world / path).read_bytes())
        content[-1] ^= 1
        (world / path).write_bytes(content)

    return prepare


def harmful(section: str, name: str) -> Prepare:
    """Let a run's recipe name a module that leaves a trace where it is imported; it lies where Python would find it."""

    def prepare(world: Path) -> None:
        (world / "harmful.py").write_text("import pathlib\npathlib.Path('executed').touch()\n")
        recipe = yaml.safe_load((world / "run/recipe.yaml").read_text())
        recipe[section] = {"name": name}
        (world / "run/recipe.yaml").write_text(yaml.safe_dump(recipe))

    return prepare


def set_window(path: Path, window: int) -> None:
    """Change the window of every task in a ``stream.json``."""
    stream = json.loads(path.read_text())
    for task in stream["tasks"]:
        task["preparation"]["window"] = window
    path.write_text(json.dumps(stream))


def swap(path: str, old: str, new: str) -> Prepare:
    """Replace text in a file; the old text must be there."""

    def prepare(world: Path) -> None:
        before = (world / path).read_text()
        assert old in before
        (world / path).write_text(before.replace(old, new))

    return prepare


def not_a_method(world: Path) -> None:
    """A module whose class lacks most of a method."""
    (world / "mine.py").write_text("class Half:\n    Options = None\n    sees_all_tasks = False\n")


def only_class_4_absent(world: Path) -> None:
    """No training mask shows class 4."""
    for path in (world / "photos/masks").iterdir():
        mask = np.asarray(Image.open(path)).copy()
        mask[mask == 4] = 0
        Image.fromarray(mask).save(path)


GREY = np.full((36, 40), 7, np.uint8)
RUN = "run photos.yaml --out out --quiet"
TINY = "run tiny.yaml --out out --quiet"
WEIGHTS = f"{RUN} network.weights"
AGAIN = "run tiny.yaml --out run"
PREDICT = "predict run -i photos/images -o out"
STATE = "run/tasks/02-09-10"

RECIPES = {
    "unknown recipe": Case("run dmeo --out out", USAGE, ("no recipe 'dmeo'", "did you mean 'demo'")),
    "recipe is a folder": Case("run photos --out out", USAGE, ("no recipe 'photos'",)),
    "broken YAML": Case("run bad.yaml --out out", USAGE, ("bad.yaml is not valid YAML",), text("bad.yaml", "a: [1")),
    "YAML is a list": Case("run bad.yaml --out out", USAGE, ("must be a mapping",), text("bad.yaml", "- 1\n- 2")),
    "YAML is empty": Case("run bad.yaml --out out", USAGE, ("must be a mapping",), text("bad.yaml", "")),
    "YAML keys are numbers": Case("run bad.yaml --out out", USAGE, ("must be a mapping",), text("bad.yaml", "1: 2")),
    "YAML is no text": Case("run bad.yaml --out out", USAGE, ("not valid YAML",), text("bad.yaml", b"\xff\xfe\x00a")),
    "YAML with code": Case(
        "run bad.yaml --out out",
        USAGE,
        ("not valid YAML",),
        text("bad.yaml", "name: !!python/object/apply:pathlib.Path.touch [executed]"),
    ),
    "unknown section": Case(f"{TINY} trainin.epochs=1", USAGE, ("unknown key 'trainin'", "did you mean 'training'")),
    "unknown key": Case(f"{TINY} training.epoch=1", USAGE, ("unknown key 'training.epoch'", "did you mean 'epochs'")),
    "unknown engine key": Case(f"{TINY} engine.devise=cpu", USAGE, ("'engine.devise'", "did you mean 'device'")),
    "unknown method option": Case(f"{TINY} method.lambda_sda=1", USAGE, ("'lambda_sda'", "did you mean 'lambda_sad'")),
    "unknown network option": Case(f"{TINY} network.widht=8", USAGE, ("'widht'", "did you mean 'width'")),
    "unknown data option": Case(f"{TINY} data.sise=32", USAGE, ("'sise'", "did you mean 'size'")),
    "missing section": Case(RUN, USAGE, ("'stream' is missing",), swap("photos.yaml", "stream:", "# stream:")),
    "word for a number": Case(f"{TINY} training.epochs=many", USAGE, ("training.epochs", "integer", "'many'")),
    "word for a method's number": Case(f"{TINY} method.lambda_sad=x", USAGE, ("lambda_sad", "number")),
    "word for a network's number": Case(f"{TINY} network.width=x", USAGE, ("width", "integer")),
    "word for a data set's number": Case(f"{TINY} data.size=x", USAGE, ("size", "integer")),
    "number for a section": Case(f"{TINY} training=5", USAGE, ("training is not a mapping",)),
    "negative epochs": Case(f"{TINY} training.epochs=-1", USAGE, ("training.epochs", "greater than or equal to 1")),
    "infinite learning rate": Case(f"{TINY} training.lr=.inf", USAGE, ("training.lr", "finite")),
    "no batch": Case(f"{TINY} training.batch_size=0", USAGE, ("training.batch_size",)),
    "mean and std differ": Case(f"{TINY} augment.mean=[0.5]", USAGE, ("mean", "std", "same length")),
    "std of zero": Case(f"{TINY} augment.std=[0,1,1]", USAGE, ("augment.std",)),
    "override without a value": Case(f"{TINY} training.epochs", USAGE, ("'training.epochs' is not an override",)),
    "override is no YAML": Case(f"{TINY} name=[a", USAGE, ("value of 'name' cannot be read",)),
    "override below a value": Case(f"{TINY} seed.x=1", USAGE, ("'seed' is a single value",)),
}
PARTS = {
    "unknown data set": Case(f"{TINY} data=dogits", USAGE, ("unknown data set 'dogits'", "did you mean 'digits'")),
    "data set needs a folder": Case(f"{TINY} data=folders", USAGE, ("'folders' needs a folder",)),
    "built-in data with a folder": Case(f"{TINY} data.root=photos", USAGE, ("built in",)),
    "unknown method": Case(f"{TINY} method=satr", USAGE, ("no method 'satr'", "did you mean 'star'")),
    "method of no module": Case(
        f"{TINY} method=nowhere:Mine --allow-code", USAGE, ("'nowhere:Mine' cannot be imported",)
    ),
    "method of no class": Case(
        f"{TINY} method=mine:Whole --allow-code", USAGE, ("cannot be imported", "Whole"), not_a_method
    ),
    "no method": Case(f"{TINY} method=mine:Half --allow-code", USAGE, ("not a method", "derive"), not_a_method),
    "method is a function": Case(f"{TINY} method=shutil:copy --allow-code", USAGE, ("'shutil:copy' is not a method",)),
    "unknown network": Case(f"{TINY} network=deeplap", USAGE, ("'deeplap'", "did you mean 'deeplab'")),
    "unknown backbone": Case(f"{TINY} network.backbone=resnet81", USAGE, ("unknown backbone 'resnet81'",)),
    "weights file missing": Case(f"{WEIGHTS}=w.pth", FAILED, ("w.pth does not exist",)),
    "weights with a wrong key": Case(
        f"{WEIGHTS}=w.safetensors",
        FAILED,
        ("does not fit", "1 of", "missing", "bn1.weihgt"),
        resnet_weights(lambda t: t.update({"bn1.weihgt": t.pop("bn1.weight")})),
    ),
    "weights of a wrong shape": Case(
        f"{WEIGHTS}=w.safetensors",
        FAILED,
        ("does not fit", "bn1.weight has shape (9,)"),
        resnet_weights(lambda t: t.update({"bn1.weight": torch.zeros(9)})),
    ),
    "weights with code": Case(f"{WEIGHTS}=w.pth", FAILED, ("could run code", "safetensors"), bomb),
    "weights that are a pickle": Case(f"{WEIGHTS}=w.pth", FAILED, ("not a readable torch file",), bare_bomb),
    "weights damaged": Case(f"{WEIGHTS}=w.safetensors", FAILED, ("not a readable",), text("w.safetensors", b"\0" * 99)),
    "weights of another kind": Case(f"{WEIGHTS}=w.txt", FAILED, ("not a weights file",), text("w.txt", "1")),
    "no ImageNet weights": Case(f"{WEIGHTS}=imagenet", USAGE, ("no ImageNet weights", "tiny_resnet")),
    "crop off the stride": Case(f"{TINY} augment.crop=33", USAGE, ("augment.crop=33", "multiples of 4", "32")),
    "batch of one": Case(f"{TINY} training.batch_size=1", USAGE, ("training.batch_size=1", "fewer than 2 images")),
    "fp16 on a CPU": Case(f"{TINY} engine.precision=fp16", USAGE, ("fp16", "CPU")),
    "unknown tracker": Case(f"{TINY} engine.trackers=[comet]", USAGE, ("engine.trackers", "'tensorboard'")),
}
DATA = {
    "missing folder": Case(f"{RUN} data.root=nowhere", FAILED, ("nowhere does not exist",)),
    "folder is a file": Case(f"{RUN} data.root=tiny.yaml", FAILED, ("tiny.yaml is not a folder",)),
    "another layout": Case(f"{RUN} data.name=voc", FAILED, ("photos is not a data set in the VOC layout",)),
    "image without mask": Case(
        f"{RUN} data.holdout=2",
        FAILED,
        ("image without mask", "p3.png"),
        lambda w: [(w / "photos" / f).unlink() for f in ("train.txt", "test.txt", "masks/p3.png")],
    ),
    "mask without image": Case(
        f"{RUN} data.holdout=2",
        FAILED,
        ("mask without image", "p3.png"),
        lambda w: [(w / "photos" / f).unlink() for f in ("train.txt", "test.txt", "images/p3.png")],
    ),
    "no split": Case(
        RUN,
        FAILED,
        ("does not say which images",),
        lambda w: [(w / f"photos/{f}.txt").unlink() for f in ("train", "test")],
    ),
    "sizes differ": Case(
        RUN,
        FAILED,
        ("'p2' differ in size", "36", "30"),
        picture("photos/images/p2.png", np.zeros((30, 40, 3), np.uint8)),
    ),
    "label without a class": Case(
        RUN, FAILED, ("p2.png has label 7", "outside the class list"), picture("photos/masks/p2.png", GREY)
    ),
    "colour mask": Case(RUN, FAILED, ("p2.png is a colour image",), picture("photos/masks/p2.png", GREY, "RGB")),
    "corrupt mask": Case(RUN, FAILED, ("p2.png is not a readable image",), text("photos/masks/p2.png", b"\x89PNG\r\n")),
    "corrupt PNG": Case(RUN, FAILED, ("p2.png is not a readable image",), cut("photos/images/p2.png")),
    "truncated JPEG": Case(RUN, FAILED, ("p1.jpg is not a readable image",), jpeg_cut_off),
    "truncated JPEG met by a worker": Case(
        f"{RUN} engine.workers=1", FAILED, ("p1.jpg is not a readable image",), jpeg_cut_off
    ),
    "empty list": Case(RUN, FAILED, ("train.txt is empty",), text("photos/train.txt", "\n\n")),
    "list of a missing file": Case(
        RUN, FAILED, ("train.txt line 2", "missing image", "p77"), text("photos/train.txt", "p0\np77\n")
    ),
    "list of a missing mask": Case(RUN, FAILED, ("train.txt line 4", "missing mask"), gone("photos/masks/p3.png")),
    "sample listed twice": Case(RUN, FAILED, ("line 2", "a second time"), text("photos/train.txt", "p0\np0\n")),
    "no class file": Case(RUN, FAILED, ("no class file",), gone("photos/classes.txt")),
    "empty class file": Case(RUN, FAILED, ("classes.txt is empty",), text("photos/classes.txt", "\n")),
    "class id twice": Case(RUN, FAILED, ("gives id 1 twice",), text("photos/classes.txt", "1 cat\n1 dog\n")),
    "class nobody shows": Case(RUN, FAILED, ("no training image for task 'house'",), only_class_4_absent),
}
STREAMS = {
    "class twice in the order": Case(f"{RUN} stream.order=[cat,dog,cat,tree]", USAGE, ("class 'cat' occurs twice",)),
    "unknown class name": Case(f"{RUN} stream.order=[cat,dgo]", USAGE, ("unknown class 'dgo'", "did you mean 'dog'")),
    "unknown class id": Case(f"{RUN} stream.order=[1,2,9]", USAGE, ("class 9",)),
    "empty order": Case(f"{RUN} stream.order=[]", USAGE, ("order is empty",)),
    "unknown order": Case(f"{RUN} stream.order=random", USAGE, ("stream.order", "'shuffled'")),
    "base above the classes": Case(f"{RUN} stream.base=5", USAGE, ("base", "5", "4")),
    "step that does not divide": Case(f"{RUN} stream.base=1 stream.step=2", USAGE, ("step",)),
    "unknown setting": Case(f"{RUN} stream.setting=overlapp", USAGE, ("stream.setting", "'overlap'")),
    "partition without a file": Case(f"{RUN} stream.setting=partition", USAGE, ("needs partition_file",)),
    "partition file missing": Case(
        f"{RUN} stream.setting=partition stream.partition_file=lists.txt", FAILED, ("lists.txt does not exist",)
    ),
}
FOLDERS = {
    "a run is there": Case(AGAIN, FAILED, ("there is a run in run already", "--resume"), copied_run()),
    "resumed with another recipe": Case(f"{AGAIN} --resume seed=9", FAILED, ("another value of 'seed'",), copied_run()),
    "resumed with other data": Case(f"{AGAIN} --resume data.train=25", FAILED, ("'data.train'",), copied_run()),
    "resumed with a damaged stream": Case(
        f"{AGAIN} --resume", FAILED, ("stream.json is not valid JSON",), copied_run(text("run/stream.json", "{"))
    ),
    "resumed with a damaged recipe": Case(
        f"{AGAIN} --resume", FAILED, ("recipe.yaml", "damaged"), copied_run(text("run/recipe.yaml", "a: [1"))
    ),
    "folder of something else": Case(
        "run tiny.yaml --out photos", FAILED, ("photos is not empty and not a run folder",)
    ),
    "file in the way": Case("run tiny.yaml --out photos.yaml", FAILED, ("photos.yaml is not a folder",)),
    "file above in the way": Case("run tiny.yaml --out photos.yaml/x", FAILED, ("photos.yaml/x cannot be written",)),
}
PREDICTION = {
    "predict without a run": Case("predict photos -i photos/images -o out", FAILED, ("photos is not a run folder",)),
    "predict too early": Case(PREDICT, FAILED, ("no task of run is sealed yet",), without_sealed_task),
    "no such input": Case("predict run -i nothing.png -o out", FAILED, ("nothing.png does not exist",), copied_run()),
    "input of another kind": Case(
        "predict run -i tiny.yaml -o out", FAILED, ("tiny.yaml is not an image",), copied_run()
    ),
    "no images in a folder": Case(
        "predict run -i empty -o out", FAILED, ("no images",), copied_run(lambda w: (w / "empty").mkdir())
    ),
    "two images, one name": Case(
        PREDICT,
        FAILED,
        ("p0.jpg", "p0.png", "would both be written"),
        copied_run(picture("photos/images/p0.jpg", GREY)),
    ),
    "corrupt input": Case(
        "predict run -i photos/images/p0.png -o out",
        FAILED,
        ("p0.png is not a readable",),
        copied_run(cut("photos/images/p0.png")),
    ),
    "16-bit input": Case(
        "predict run -i deep.png -o out",
        FAILED,
        ("deep.png has pixel format", "8-bit"),
        copied_run(picture("deep.png", GREY.astype(np.uint16))),
    ),
    "transparent input": Case(
        "predict run -i clear.png -o out",
        FAILED,
        ("clear.png has transparent pixels",),
        copied_run(picture("clear.png", np.zeros((8, 8, 4), np.uint8))),
    ),
    "weights of the run damaged": Case(
        PREDICT, FAILED, ("weights.safetensors is not a readable",), copied_run(cut(f"{STATE}/weights.safetensors"))
    ),
    "weights of the run gone": Case(
        PREDICT, FAILED, ("weights.safetensors does not exist",), copied_run(gone(f"{STATE}/weights.safetensors"))
    ),
    "weights of another run": Case(
        PREDICT,
        FAILED,
        ("weights.safetensors lacks", "comes from another run"),
        copied_run(lambda w: shutil.copy(w / "run/tasks/00-01-06/weights.safetensors", w / STATE)),
    ),
    "ledger damaged": Case(
        PREDICT, FAILED, ("ledger.json is not valid JSON",), copied_run(cut(f"{STATE}/ledger.json"))
    ),
    "ledger of another form": Case(
        PREDICT, FAILED, ("ledger.json is not a ledger",), copied_run(text(f"{STATE}/ledger.json", '{"items": [1]}'))
    ),
    "stream damaged": Case(
        PREDICT, FAILED, ("stream", "damaged"), copied_run(text("run/stream.json", '{"tasks": []}'))
    ),
    "recipe damaged": Case(PREDICT, FAILED, ("recipe.yaml", "damaged"), copied_run(text("run/recipe.yaml", "name: 1"))),
    "a byte of the weights changed": Case(
        PREDICT, FAILED, ("weights.safetensors", "hash"), copied_run(flipped(f"{STATE}/weights.safetensors"))
    ),
    "a run that names foreign code as its method": Case(
        PREDICT,
        USAGE,
        ("names code outside of Perdure: 'harmful:Method'", "--allow-code"),
        copied_run(harmful("method", "harmful:Method")),
    ),
    "a run that names foreign code as its network": Case(
        PREDICT,
        USAGE,
        ("names code outside of Perdure: 'harmful:build'", "--allow-code"),
        copied_run(harmful("network", "harmful:build")),
    ),
    "a run with yaml aliases": Case(
        PREDICT,
        FAILED,
        ("recipe.yaml", "references to other values"),
        copied_run(text("run/recipe.yaml", "a: &a [1]\nb: [*a, *a]")),
    ),
    "a run with a huge window": Case(
        PREDICT, FAILED, ("stream.json",), copied_run(lambda w: set_window(w / "run/stream.json", 10**9))
    ),
    "unknown device": Case(f"{PREDICT} --device gpu", USAGE, ("no device 'gpu'",), copied_run()),
    "masks into a file": Case(
        "predict run -i photos/images -o tiny.yaml", FAILED, ("could not write tiny.yaml",), copied_run()
    ),
}
RESULTS = {
    "audit without a run": Case("audit photos", FAILED, ("photos is not a run folder",)),
    "report without a run": Case("report photos", FAILED, ("photos is not a run folder",)),
    "report with a damaged ledger": Case(
        "report run", FAILED, ("ledger.json",), copied_run(cut(f"{STATE}/ledger.json"))
    ),
    "report with a damaged stream": Case(
        "report run", FAILED, ("stream.json",), copied_run(text("run/stream.json", "[]"))
    ),
    "report with a damaged recipe": Case(
        "report run", FAILED, ("recipe.yaml",), copied_run(text("run/recipe.yaml", "a: [1"))
    ),
    "compare without a run": Case("compare photos", FAILED, ("photos is not a run folder",)),
    "compare different streams": Case(
        "compare run other --html out.html", USAGE, ("cannot be compared", "data set"), other_stream
    ),
    "compare too early": Case("compare run --html out.html", USAGE, ("no finished task",), without_sealed_task),
    "unknown figure": Case(
        "compare run --figure miou.al --html out.html", USAGE, ("'miou.al'", "did you mean 'miou.all'"), copied_run()
    ),
    "figure of one class": Case("compare run --figure iou", USAGE, ("one value for each class",), copied_run()),
    "counts damaged": Case("compare run", FAILED, ("counts.json",), copied_run(cut(f"{STATE}/counts.json"))),
    "page into a folder": Case("compare run --html photos", FAILED, ("photos",), copied_run()),
}
VERBS = {
    "unknown verb": Case("runn", USAGE, ("runn", "'run'")),
    "unknown option": Case("run tiny.yaml --outt out", USAGE, ("--outt",)),
    "missing argument": Case("run", USAGE, ("recipe",)),
    "missing option": Case("predict run", USAGE, ("--input",)),
    "option without a value": Case("run tiny.yaml --out", USAGE, ("--out",)),
    "unknown list": Case("list recipies", USAGE, ("no list 'recipies'", "did you mean 'recipes'")),
    "check an unknown recipe": Case("check demmo", USAGE, ("no recipe 'demmo'", "did you mean 'demo'")),
    "check a missing folder": Case("check folders nowhere", FAILED, ("nowhere does not exist",)),
    "check without the folder": Case("check camvid", USAGE, ("'camvid' needs a folder",)),
    "check with an unknown option": Case(
        "check folders photos holdot=2", USAGE, ("'holdot'", "did you mean 'holdout'")
    ),
    "check with half an option": Case("check folders photos holdout", USAGE, ("'holdout' is not an override",)),
    "check a crop off the stride": Case("check tiny.yaml augment.crop=33", USAGE, ("augment.crop=33",)),
    "demo in the way": Case(
        "demo --fresh --out there",
        FAILED,
        ("there/finetune is not a run folder",),
        lambda w: (w / "there/finetune").mkdir(parents=True),
    ),
}
CASES = RECIPES | PARTS | DATA | STREAMS | FOLDERS | PREDICTION | RESULTS | VERBS


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file with its content, and every folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def plain_lines(err: str, says: tuple[str, ...], place: Path) -> list[str]:
    """The lines of a message, checked: one or two, plain, and telling what they should."""
    lines = err.splitlines()
    assert 1 <= len(lines) <= 2, err
    assert lines[0].startswith("error: ") and len(lines[0]) > 20, err
    assert all(line.startswith(" " * 7) and line.strip() for line in lines[1:]), err
    assert "Traceback" not in err and "this is a bug" not in err, err
    assert str(place) not in err, err
    assert all(word in err for word in says), err
    return lines


@pytest.mark.e2e
@pytest.mark.parametrize("name", CASES)
def test_bad_input(
    name: str, cli, world: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    if " run" in case.command:
        (world.parent / "finished").symlink_to(request.getfixturevalue("star_run"))
    if case.prepare is not None:
        case.prepare(world)
    monkeypatch.syspath_prepend(world)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # the cache of a method of one's own is Python's, not ours
    before = snapshot(world)
    done = cli(*shlex.split(case.command))
    assert done.code == case.code, done.err
    plain_lines(done.err, case.says, world.parent)
    assert done.out == ""
    assert snapshot(world) == before
