"""Whatever is wrong with the input: an exit code, one or two plain lines, and nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
import struct
import sys
import zlib
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


def sets_recipe(world: Path) -> None:
    """Write a recipe of data sets that names none."""
    recipe = yaml.safe_load((world / "photos.yaml").read_text())
    del recipe["data"]
    recipe["stream"] = {"kind": "data_sets"}
    (world / "sets.yaml").write_text(yaml.safe_dump(recipe))


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


def val_set(world: Path) -> None:
    """Make a test photograph the validation set."""
    (world / "photos/test.txt").write_text("p5\np6\n")
    (world / "photos/val.txt").write_text("p7\n")


def then(*steps: Prepare) -> Prepare:
    """One after another."""
    return lambda world: [step(world) for step in steps]


def masks(change: Callable[[np.ndarray], np.ndarray]) -> Prepare:
    """Change every mask."""

    def prepare(world: Path) -> None:
        for path in (world / "photos/masks").iterdir():
            Image.fromarray(change(np.asarray(Image.open(path)).copy())).save(path)

    return prepare


def turned(path: str) -> Prepare:
    """Give a photograph the flag of a camera that was held upright; its mask stays as it is."""

    def prepare(world: Path) -> None:
        with Image.open(world / path) as picture:
            picture.load()
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.save(world / path, exif=exif)

    return prepare


def stack(world: Path) -> None:
    """Replace a test photograph by a TIFF file of three pages."""
    (world / "photos/images/p6.png").unlink()
    pages = [Image.fromarray(np.full((36, 40, 3), k, np.uint8)) for k in range(3)]
    pages[0].save(world / "photos/images/p6.tif", save_all=True, append_images=pages[1:])


def bomb_picture(path: str) -> Prepare:
    """A PNG of a few bytes that says it has 3.6 thousand million pixels."""

    def prepare(world: Path) -> None:
        head = struct.pack(">II5B", 60000, 60000, 8, 2, 0, 0, 0)
        chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 99)), (b"IEND", b""))
        body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
        (world / path).write_bytes(b"\x89PNG\r\n\x1a\n" + body)

    return prepare


def pipe(path: str) -> Prepare:
    """Put a pipe there: whoever opens it to read waits for ever."""

    def prepare(world: Path) -> None:
        (world / path).unlink(missing_ok=True)
        os.mkfifo(world / path)

    return prepare


def odd_names(*names: bytes) -> Prepare:
    """Photographs with masks under such names, and no lists."""

    def prepare(world: Path) -> None:
        for split in ("train", "test"):
            (world / f"photos/{split}.txt").unlink()
        for name in map(os.fsdecode, names):
            for part in ("images", "masks"):
                shutil.copy(world / f"photos/{part}/p0.png", world / f"photos/{part}/{name}.png")

    return prepare


def counts_of(value: int) -> Prepare:
    """Put a number into the counts of a run."""

    def prepare(world: Path) -> None:
        path = world / STATE / "counts.json"
        content = json.loads(path.read_text())
        next(iter(content["sets"].values()))["matrix"][0][0] = value
        path.write_text(json.dumps(content))

    return prepare


def ragged(world: Path) -> None:
    """Leave a number out of the counts of a run."""
    path = world / STATE / "counts.json"
    content = json.loads(path.read_text())
    next(iter(content["sets"].values()))["matrix"][0].pop()
    path.write_text(json.dumps(content))


def sample_cut(world: Path) -> None:
    """Damage a picture that the report shows."""
    cut(next(p for p in sorted((world / STATE / "samples").iterdir()) if ".image." in p.name).relative_to(world))(world)


READER = """\
from pathlib import Path
import numpy as np
from perdure.data.source import Source
from perdure.labels import label_space

class Mine(Source):
    name, kind, patients, other_label = "mine", "segmentation", False, 0
    space = label_space(["cat", "dog"])
    def names(self, split): return [f"{split}{k}" for k in range(4)]
    def image(self, split, name): return IMAGE
    def mask(self, split, name): return MASK
    def fingerprint(self, split): return split + "CASE"

def open_mine(root: Path, odd: bool = False): return Mine()
def open_wrong(): return 5
def open_failing(): raise KeyError("labels")
"""


def reader(image: str = "np.zeros((3, 36, 40), np.uint8)", mask: str = "np.eye(36, 40, dtype=np.int16) + 1") -> Prepare:
    """A module ``ours_…`` with a reader; its name depends on what it returns, as Python imports a module once."""
    name = f"ours_{zlib.crc32((image + mask).encode())}"
    text_ = READER.replace("IMAGE", image).replace("MASK", mask).replace("CASE", name)
    return lambda world: (world / f"{name}.py").write_text(text_)


def own(image: str = "np.zeros((3, 36, 40), np.uint8)", mask: str = "np.eye(36, 40, dtype=np.int16) + 1") -> str:
    """The module that :func:`reader` writes."""
    return f"ours_{zlib.crc32((image + mask).encode())}"


GREY = np.full((36, 40), 7, np.uint8)
NAMES = [f"p{k}" for k in range(8)]
RUN = "run photos.yaml --out out --quiet"
TINY = "run tiny.yaml --out out --quiet"
WEIGHTS = f"{RUN} network.weights"
AGAIN = "run tiny.yaml --out run"
PREDICT = "predict run -i photos/images -o out"
STATE = "run/tasks/02-09-10"

RECIPES = {
    "unknown recipe": Case("run dmeo --out out", USAGE, ("no recipe 'dmeo'", "did you mean 'demo'")),
    "recipe is a folder": Case("run photos --out out", USAGE, ("photos is a folder, not a recipe", "--data photos")),
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
    "unknown key": Case(
        f"{TINY} training.epoch=1", USAGE, ("unknown key 'training.epoch'", "did you mean 'training.epochs'")
    ),
    "key without its section": Case(f"{TINY} epochs=3", USAGE, ("'epochs'", "did you mean 'training.epochs'?")),
    "key of two sections": Case(
        f"{TINY} batch_size=3", USAGE, ("did you mean 'evaluate.batch_size' or 'training.batch_size'?",)
    ),
    "unknown engine key": Case(f"{TINY} engine.devise=cpu", USAGE, ("'engine.devise'", "did you mean 'engine.device'")),
    "unknown method option": Case(f"{TINY} method.lambda_sda=1", USAGE, ("'lambda_sda'", "did you mean 'lambda_sad'")),
    "unknown network option": Case(f"{TINY} network.widht=8", USAGE, ("'widht'", "did you mean 'width'")),
    "no tolerance": Case(f"{TINY} evaluate.tolerance=0", USAGE, ("evaluate.tolerance", "greater than 0")),
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
BINARY = np.uint8(255)
NINE = "np.eye(36, 40, dtype=np.int16) + 1 + 8 * np.eye(36, 40, 39, dtype=np.int16)"
SMALL = "stream.base=1 stream.step=1"
BEFORE_WORK = {
    "corrupt test image": Case(RUN, FAILED, ("p6.png is not a readable image",), cut("photos/images/p6.png")),
    "two corrupt images": Case(
        RUN,
        FAILED,
        ("p1.png is not a readable image", "(and 1 more: `perdure check` names them)"),
        then(cut("photos/images/p6.png"), cut("photos/images/p1.png")),
    ),
    "corrupt validation image": Case(
        RUN, FAILED, ("p7.png is not a readable image",), then(val_set, cut("photos/images/p7.png", 0.9))
    ),
    "corrupt validation mask": Case(
        RUN, FAILED, ("masks/p7.png is not a readable image",), then(val_set, cut("photos/masks/p7.png"))
    ),
    "test image that is text": Case(RUN, FAILED, ("p6.png is not a readable",), text("photos/images/p6.png", "hello")),
    "test mask of another size": Case(
        RUN, FAILED, ("'p6' differ in size",), picture("photos/images/p6.png", np.zeros((9, 40, 3), np.uint8))
    ),
    "masks of 0 and 255": Case(
        RUN,
        FAILED,
        ("no training mask shows a class, only background and 255", "'data.values={255: 1}'"),
        masks(lambda m: np.where(m > 0, BINARY, np.uint8(0))),
    ),
    "masks of background": Case(
        RUN, FAILED, ("no training mask shows a class, only background",), masks(lambda m: m * np.uint8(0))
    ),
    "class without a pixel beside another": Case(
        RUN,
        FAILED,
        ("no training image of task 'classes 1 to 2' shows class 'dog'", "stream.order"),
        masks(lambda m: np.where(m == 2, np.uint8(0), m)),
    ),
    "photograph with a rotation flag": Case(
        RUN,
        FAILED,
        (
            "'p6' differ in size (width×height): image photos/images/p6.png 36×40, mask photos/masks/p6.png 40×36",
            "rotation flag (EXIF)",
        ),
        turned("photos/images/p6.png"),
    ),
    "TIFF stack": Case(RUN, FAILED, ("p6.tif holds 3 pictures",), stack),
    "picture that would fill the memory": Case(
        RUN, FAILED, ("p6.png has more than 178 million pixels",), bomb_picture("photos/images/p6.png")
    ),
    "validation without images for it": Case(
        f"{RUN} engine.validate_every=1", USAGE, ("has no validation set", "data.validation=10")
    ),
    "validation of too many": Case(
        f"{RUN} data.validation=1", USAGE, ("data.validation", "greater than or equal to 2")
    ),
    "validation of too many in a check": Case("check folders photos validation=1", USAGE, ("validation is 1",)),
    "validation beside a validation set": Case(
        f"{RUN} data.validation=2", USAGE, ("has 1 validation images of its own",), val_set
    ),
    "name that is not UTF-8": Case(
        f"{RUN} data.holdout=2", FAILED, ("p\\xff.png is not plain UTF-8",), odd_names(b"p\xff")
    ),
    "name that commands a terminal": Case(
        f"{RUN} data.holdout=2", FAILED, ("p\\x1b[31m.png is not plain UTF-8",), odd_names(b"p\x1b[31m")
    ),
    "class name that commands a terminal": Case(
        RUN, FAILED, ("'\\x1b[31mcat' holds a control",), text("photos/classes.txt", "1 \x1b[31mcat\n2 dog\n")
    ),
    "class name that turns the writing": Case(
        RUN, FAILED, ("'\\u202etac' holds a control",), text("photos/classes.txt", "1 \u202etac\n2 dog\n")
    ),
    "class name too long": Case(RUN, FAILED, ("has 300 characters",), text("photos/classes.txt", f"1 {'a' * 300}\n")),
    "class number too long": Case(RUN, FAILED, ("is out of range",), text("photos/classes.txt", f"{'9' * 5000} cat\n")),
    "recipe name that commands a terminal": Case(
        f"{RUN} 'name=\"a\\x1b[31mb\"'", USAGE, ("name: holds the control character \\x1b",)
    ),
    "recipe name too long": Case(f"{RUN} name={'n' * 300}", USAGE, ("name: has 300 bytes",)),
    "run folder with a name too long": Case(
        f"run photos.yaml --quiet --out {'o' * 300}", FAILED, ("File name too long: ooo",)
    ),
    "path with a NUL": Case(f"{RUN} 'data.root=\"a\\0b\"'", FAILED, ("does not exist",)),
    "home of nobody": Case(f"{RUN} data.root=~nosuchuser/photos", USAGE, ("no home folder of '~nosuchuser'",)),
    "pool in the home of nobody": Case(
        f"{RUN} stream.pool=folder stream.pool_folder=~nosuchuser", USAGE, ("no home folder of '~nosuchuser'",)
    ),
    "weights in the home of nobody": Case(f"{WEIGHTS}=~nosuchuser/w.pth", USAGE, ("a user that does not exist",)),
    "100,000 threads": Case(f"{TINY} engine.threads=100000", USAGE, ("engine.threads", "less than or equal to 512")),
    "100,000 workers": Case(f"{TINY} engine.workers=100000", USAGE, ("engine.workers", "less than or equal to 256")),
    "recipe nested deeply": Case(
        "run bad.yaml --out out", USAGE, ("nested too deeply",), text("bad.yaml", "a: " + "[" * 9000 + "]" * 9000)
    ),
    "recipe nested a little too deeply": Case(
        "run bad.yaml --out out", USAGE, ("nested too deeply",), text("bad.yaml", "a: " + "[" * 60 + "]" * 60)
    ),
    "override nested deeply": Case(f"{TINY} name={'[' * 500}{']' * 500}", USAGE, ("value of 'name' cannot be read",)),
    "classes nested deeply": Case(
        RUN, FAILED, ("nested too deeply",), then(gone("photos/classes.txt"), text("photos/classes.json", "[" * 99999))
    ),
    "key twice in a recipe": Case(
        "run bad.yaml --out out", USAGE, ("the key 'seed' occurs twice",), text("bad.yaml", "seed: 1\nname: a\nseed: 2")
    ),
    "key twice in a section": Case(
        "run bad.yaml --out out", USAGE, ("the key 'lr' occurs twice",), text("bad.yaml", "training: {lr: 1, lr: 2}")
    ),
    "pipe for a recipe": Case("run pipe --out out", USAGE, ("no recipe 'pipe'",), pipe("pipe")),
    "pipe for an image": Case(RUN, FAILED, ("p6.png is a pipe or a device",), pipe("photos/images/p6.png")),
    "pipe for a mask": Case(RUN, FAILED, ("p2.png is a pipe or a device",), pipe("photos/masks/p2.png")),
    "pipe for a class file": Case(f"{RUN} data.classes=pipe", FAILED, ("pipe is a pipe",), pipe("pipe")),
    "device for a class file": Case(f"{RUN} data.classes=/dev/zero", FAILED, ("/dev/zero is a pipe or a device",)),
    "pipe for a list": Case(RUN, FAILED, ("no split 'train'",), pipe("photos/train.txt")),
    "pipe for weights": Case(f"{WEIGHTS}=w.pth", FAILED, ("w.pth does not exist",), pipe("w.pth")),
}
OWN_CODE = {
    "method of one's own without the flag": Case(
        f"{TINY} method=mine:Half", USAGE, ("names code outside of Perdure: 'mine:Half'", "--allow-code"), not_a_method
    ),
    "reader of one's own without the flag": Case(
        f"{RUN} data.name={own()}:open_mine", USAGE, (f"'{own()}:open_mine'", "--allow-code"), reader()
    ),
    "check of a reader without the flag": Case(
        f"check {own()}:open_mine photos", USAGE, ("code outside of Perdure", "--allow-code"), reader()
    ),
    "reader that is nowhere": Case(
        f"{RUN} data.name=nowhere:open --allow-code", USAGE, ("reader 'nowhere:open' cannot be imported", "--debug")
    ),
    "reader without a folder": Case(
        f"{RUN} data.name={own()}:open_mine data.root=null --allow-code", USAGE, ("needs a folder",), reader()
    ),
    "reader that takes no folder": Case(
        f"{RUN} data.name={own()}:open_wrong --allow-code", USAGE, ("reads no folder",), reader()
    ),
    "reader that returns a number": Case(
        f"{TINY} data={own()}:open_wrong --allow-code", USAGE, ("returned a int, not a Source",), reader()
    ),
    "reader that fails": Case(
        f"{TINY} data={own()}:open_failing --allow-code", USAGE, ("failed: KeyError: 'labels'",), reader()
    ),
    "unknown option of a reader": Case(
        f"{RUN} data.name={own()}:open_mine data.od=1 --allow-code", USAGE, ("no option 'od'", "'odd'"), reader()
    ),
    "reader of flat images": Case(
        f"{RUN} {SMALL} data.name={own('np.zeros((36, 40), np.uint8)')}:open_mine --allow-code",
        FAILED,
        ("the image of 'train0' is uint8 (36, 40)",),
        reader("np.zeros((36, 40), np.uint8)"),
    ),
    "reader that fails at an image": Case(
        f"{RUN} {SMALL} data.name={own('[][1]')}:open_mine --allow-code",
        FAILED,
        ("'train0' cannot be read: IndexError",),
        reader("[][1]"),
    ),
    "reader of unknown labels": Case(
        f"{RUN} {SMALL} data.name={own(mask=NINE)}:open_mine --allow-code",
        FAILED,
        ("the mask of 'train0' holds label 9",),
        reader(mask=NINE),
    ),
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
    "predict as in no task": Case(
        "predict run -i photos/images -o out --task 9",
        USAGE,
        ("--task 9: the run has learned no such task",),
        copied_run(),
    ),
    "no such input": Case("predict run -i nothing.png -o out", FAILED, ("nothing.png does not exist",), copied_run()),
    "input of another kind": Case(
        "predict run -i tiny.yaml -o out", FAILED, ("tiny.yaml is not an image",), copied_run()
    ),
    "volume for a model of photographs": Case(
        "predict run -i scan.nii.gz -o out",
        FAILED,
        ("scan.nii.gz is a volume, and the model learned from photographs", "readable: .jpg"),
        copied_run(text("scan.nii.gz", b"")),
    ),
    "volumes in a folder for a model of photographs": Case(
        "predict run -i scans -o out",
        FAILED,
        ("scans/a.mha is a volume, and the model learned from photographs",),
        copied_run(lambda w: (w / "scans").mkdir(), text("scans/a.mha", b"")),
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
    "pipe as an input": Case(
        "predict run -i photos/images/p0.png -o out",
        FAILED,
        ("p0.png is a pipe or a device",),
        copied_run(pipe("photos/images/p0.png")),
    ),
    "stack as an input": Case("predict run -i photos/images/p6.tif -o out", FAILED, ("holds 3",), copied_run(stack)),
    "input that would fill the memory": Case(
        "predict run -i bomb.png -o out", FAILED, ("million pixels",), copied_run(bomb_picture("bomb.png"))
    ),
    "stream that names another task than is sealed": Case(
        PREDICT,
        FAILED,
        ("run/tasks/02-09-10 is the folder of a sealed task that stream.json does not name", "perdure audit"),
        copied_run(swap("run/stream.json", '"name": "09-10"', '"name": "09-11"')),
    ),
    "pipe for a stream": Case(PREDICT, FAILED, ("not a run folder",), copied_run(pipe("run/stream.json"))),
    "pipe for weights of a run": Case(
        PREDICT, FAILED, ("is a pipe or a device",), copied_run(pipe(f"{STATE}/weights.safetensors"))
    ),
    "stream nested deeply": Case(
        PREDICT, FAILED, ("nested too deeply",), copied_run(text("run/stream.json", "[" * 900 + "]" * 900))
    ),
    "class of a run that commands a terminal": Case(
        PREDICT,
        FAILED,
        ("stream.json", "'\\x1b]0;owned\\x07' holds a control character"),
        copied_run(swap("run/stream.json", '"zero"', r'"\u001b]0;owned\u0007"')),
    ),
    "unknown device": Case(f"{PREDICT} --device gpu", USAGE, ("no device 'gpu'",), copied_run()),
    "masks into a file": Case(
        "predict run -i photos/images -o tiny.yaml", FAILED, ("could not write tiny.yaml",), copied_run()
    ),
}
RESULTS = {
    "phantoms of no kind": Case("phantoms slice out", USAGE, ("no phantoms 'slice'", "did you mean 'slices'?")),
    "phantoms of a wrong size": Case("phantoms torso out --size 8", USAGE, ("phantoms: size is 8", "32 to 256 pixels")),
    "phantoms of no number": Case("phantoms slices out --train many", USAGE, ("'--train'", "perdure phantoms --help")),
    "phantoms below nothing": Case("phantoms slices out --test -1", USAGE, ("phantoms: test is -1", "0 to 9999")),
    "phantoms without training": Case("phantoms slices out --train 0", USAGE, ("--train is 0", "set --train above 0")),
    "phantoms in a file": Case("phantoms slices tiny.yaml", FAILED, ("could not write tiny.yaml/Dataset011_Cardiac",)),
    "phantoms over a data set": Case(
        "phantoms slices out",
        USAGE,
        ("out/Dataset013_Prostate is there already", "choose another folder, or delete it"),
        lambda world: (world / "out/Dataset013_Prostate").mkdir(parents=True),
    ),
    "phantoms in a folder": Case(
        "check phantoms photos",
        USAGE,
        ("the data set 'phantoms' is built in and reads no folder", "leave the folder out"),
    ),
    "phantoms of no set": Case(
        "check phantoms set=vessel", USAGE, ("phantoms: unknown set 'vessel'", "did you mean 'vessels'?")
    ),
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
    "counts of rows of different lengths": Case(
        "compare run", FAILED, ("counts.json", "rows of different lengths"), copied_run(ragged)
    ),
    "counts that overflow": Case("compare run", FAILED, ("counts.json", "counts"), copied_run(counts_of(10**30))),
    "counts that overflow when added": Case(
        "compare run", FAILED, ("counts.json", "too large for counts"), copied_run(counts_of(2**62))
    ),
    "report with a damaged picture": Case("report run", FAILED, ("is no PNG picture",), copied_run(sample_cut)),
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
    "pictures for a recipe for volumes": Case(
        "run data-sets/volumes --data photos --out out",
        USAGE,
        ("the recipe is for volumes (volumes.view=volumes), and 'folders' holds pictures", "volumes.view=pictures"),
    ),
    "pictures where a patch of volumes is chosen": Case(
        "run sets.yaml --data photos volumes.patch=[16,16,16] --out out",
        USAGE,
        ("the recipe is for volumes (volumes.patch), and 'folders' holds pictures",),
        sets_recipe,
    ),
    "volumes for a recipe for pictures": Case(
        "run data-sets/vessels-cells --data phantoms data.kind=torso --out out",
        USAGE,
        ("the recipe is for pictures (volumes.view=pictures), and 'phantoms' holds volumes", "data-sets/volumes"),
    ),
    "volumes for a network for pictures": Case(
        "run sets.yaml --data phantoms data.kind=torso --out out",
        USAGE,
        ("the network 'deeplab' does not work in 3D, and 'phantoms' holds volumes", "residual_unet"),
        sets_recipe,
    ),
    "volumes where classes of pictures are learned in steps": Case(
        "run photos.yaml 'data={name: phantoms, kind: torso}' --out out",
        USAGE,
        ("'phantoms' holds volumes, and stream.kind=class_incremental is for pictures", "data-sets/volumes"),
    ),
    "check of nothing": Case("check", USAGE, ("nothing to check", "check --data DIR")),
    "check of options of nothing": Case("check holdout=5", USAGE, ("nothing to check",)),
    "check of a folder that is no recipe": Case(
        "check photos", USAGE, ("photos is a folder, not a recipe", "perdure check --data photos")
    ),
    "check of a folder that is not there": Case("check --data nowhere", FAILED, ("nowhere does not exist",)),
    "check of a folder of something": Case(
        "check --data other", FAILED, ("nothing in other says", "data.name=NAME"), lambda w: (w / "other").mkdir()
    ),
    "check of two folders": Case("check --data photos --data photos", USAGE, ("--data names 2 folders", "a recipe")),
    "check of a folder twice": Case(
        "check folders photos --data photos", USAGE, ("'photos' and --data photos both name a folder", "leave one")
    ),
    "check with a key that has no value": Case(
        "check sets.yaml training.steps --data photos", USAGE, ("both name a folder", "an option is written KEY=VALUE")
    ),
    "check of a folder whose dataset.json is a folder": Case(
        "check --data photos",
        FAILED,
        ("photos/dataset.json", "correct or restore it"),
        lambda w: (w / "photos/dataset.json").mkdir(),
    ),
    "check of a folder whose dataset.json is a pipe": Case(
        "check --data pipes",
        FAILED,
        ("pipes/dataset.json is a pipe",),
        then(lambda w: (w / "pipes").mkdir(), pipe("pipes/dataset.json")),
    ),
    "check of a folder whose dataset.json has a text without an end": Case(
        "check --data photos",
        FAILED,
        ("photos/dataset.json is not valid JSON",),
        text("photos/dataset.json", '"' + r"\"" * 150_000),
    ),
    "check of a folder with a number of 5,000 digits": Case(
        "check --data photos",
        FAILED,
        ("photos/dataset.json is not valid JSON", "5000 digits\n"),
        text("photos/dataset.json", f'{{"labels": {{"a": {"9" * 5000}}}}}'),
    ),
    "check of a folder with an unknown option": Case(
        "check --data photos holdot=2", USAGE, ("did you mean 'holdout'",)
    ),
    "check of a recipe of one data set with data": Case(
        "check photos.yaml --data photos", USAGE, ("takes no --data", "data.root=DIR")
    ),
    "check with half an option": Case("check folders photos holdout", USAGE, ("'holdout' is not an override",)),
    "check a crop off the stride": Case("check tiny.yaml augment.crop=33", USAGE, ("augment.crop=33",)),
    "demo in the way": Case(
        "demo --fresh --out there",
        FAILED,
        ("there/finetune is not a run folder",),
        lambda w: (w / "there/finetune").mkdir(parents=True),
    ),
    "demo of volumes in the way": Case(
        "demo --volumes --fresh --out there",
        FAILED,
        ("there/lwf is not a run folder",),
        lambda w: (w / "there/lwf").mkdir(parents=True),
    ),
}
CASES = RECIPES | PARTS | DATA | BEFORE_WORK | OWN_CODE | STREAMS | FOLDERS | PREDICTION | RESULTS | VERBS


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


MEMORY = {
    "MemoryError": (MemoryError(), "out of memory", "training.batch_size"),
    "a worker's MemoryError": (MemoryError("Caught MemoryError in DataLoader worker process 0."), "out of memory", ""),
    "NumPy": (np._core._exceptions._ArrayMemoryError((9, 9), np.dtype(float)), "out of memory", "augment.crop"),
    "torch on a CPU": (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 999999999999 bytes. Error code 12 (Cannot allocate memory)"
        ),
        "out of memory",
        "evaluate.window",
    ),
    "torch on a CPU of Windows": (RuntimeError("DefaultCPUAllocator: not enough memory"), "out of memory", ""),
    "torch on a GPU": (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), "GPU is out of memory", "bf16"),
    "cuDNN": (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "out of memory", "training.batch_size"),
    "a worker that was ended": (
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "ended by the machine", "engine.workers"
    ),
    "no process left": (BlockingIOError(11, "Resource temporarily unavailable"), "temporarily unavailable", ""),
    "a disk that fails": (OSError("broken data stream"), "cannot be read or written: broken data", ""),
    "recursion": (RecursionError("maximum recursion depth exceeded"), "nested too deeply", ""),
    "a name of bytes": (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"), "is not UTF-8", ""),
}  # fmt: skip


@pytest.mark.e2e
@pytest.mark.parametrize("name", MEMORY)
def test_what_the_machine_cannot_do(name: str, cli, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import perdure.experiment

    error, what, hint = MEMORY[name]

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(perdure.experiment, "run_experiment", fails)
    done = cli(*shlex.split(TINY))
    assert done.code == FAILED
    plain_lines(done.err, (what, hint), world.parent)


CHECKS = {
    "corrupt test image": Case(
        "check photos.yaml",
        FAILED,
        ("test p6: photos/images/p6.png is not a", "cannot run"),
        BEFORE_WORK["corrupt test image"].prepare,
    ),
    "every problem": Case(
        "check photos.yaml",
        FAILED,
        ("train p1: ", "test p6: "),
        then(cut("photos/images/p6.png"), cut("photos/images/p1.png")),
    ),
    "data set of 0 and 255": Case(
        "check folders photos",
        FAILED,
        ("problem train: no training mask shows a class, only background and 255", "values={255: 1}"),
        masks(lambda m: np.where(m > 0, BINARY, np.uint8(0))),
    ),
    "data set read by its values": Case(
        "check folders photos 'values={255: 1}'",
        0,
        ("no image of train shows dog, tree, house", "everything can be used"),
        masks(lambda m: np.where(m > 0, BINARY, np.uint8(0))),
    ),
    "an image in train and in test": Case(
        "check folders photos",
        0,
        ("1 image of test is also in train, pixel for pixel (p6 = train p2): figures", "everything can be used"),
        lambda w: Image.open(w / "photos/images/p2.png").save(w / "photos/images/p6.png", compress_level=0),
    ),
    "an image in train and in test of a recipe": Case(
        "check photos.yaml",
        0,
        ("1 image of test is also in train, pixel for pixel (p6 = train p2)", "the recipe can run"),
        lambda w: Image.open(w / "photos/images/p2.png").save(w / "photos/images/p6.png", compress_level=0),
    ),
    "folder whose reader is found": Case("check --data photos", 0, ("tree", "everything can be used")),
    "folder with options": Case(
        "check --data photos data.validation=2", 0, ("│ 2       │ 2", "everything can be used")
    ),
    "folder with its reader": Case("check folders --data photos", 0, ("tree", "everything can be used")),
    "folder with its reader among the options": Case(
        "check data.name=folders --data photos", 0, ("tree", "everything can be used")
    ),
    "folders in the place of a recipe's": Case(
        "check sets.yaml --data photos", 0, ("the recipe can run", "cat, dog, tree, house"), sets_recipe
    ),
    "patients where nobody reads them": Case(
        "check folders photos",
        0,
        ("patients.json is read for volumes only: every",),
        text("photos/patients.json", "{}"),
    ),
    "no validation set": Case(
        "check photos.yaml", 0, ("photos has no validation set: there is no val.txt", "the recipe can run")
    ),
    "a validation set taken out of train": Case("check photos.yaml data.validation=2", 0, ("│ 2     │ 3",)),
    "class that no test image shows": Case(
        "check photos.yaml",
        0,
        ("no test image shows dog, house: figures leave them out",),
        then(*(picture(f"photos/masks/{name}.png", np.eye(36, 40, dtype=np.uint8) * 2 + 1) for name in NAMES[5:])),
    ),
    "class that is never taught": Case(
        "check photos.yaml 'stream.order=[cat, dog, tree]'", 0, ("never taught, labelled as background: house",)
    ),
    "weights that cannot be fetched": Case(
        "check photos.yaml network.backbone=resnet18 network.weights=imagenet network.output_stride=16",
        FAILED,
        (
            "could not fetch the ImageNet weights of resnet18",
            "network.weights=installed network.backbone=tf_efficientnet_lite0",
            "the recipe cannot run",
        ),
    ),
    "one task only": Case("check photos.yaml stream.base=4", 0, ("one task only: nothing is learned later",)),
    "255 by habit": Case("check photos.yaml", 0, ("255 is read as ignore in 5 images of train; if it is a class",)),
    "markup in names": Case(
        "check folders photos",
        0,
        ("[red]cat[/]", "<b>dog"),
        text("photos/classes.txt", "1 [red]cat[/]\n2 <b>dog\n3 $x$\n4 d\n"),
    ),
}


@pytest.mark.e2e
@pytest.mark.parametrize("name", CHECKS)
def test_check_says_it(name: str, cli, world: Path) -> None:
    case = CHECKS[name]
    if case.prepare is not None:
        case.prepare(world)
    before = snapshot(world)
    done = cli(*shlex.split(case.command))
    assert done.err == ""
    for words in case.says:
        assert words in done.out, done.out
    assert done.code == case.code
    assert snapshot(world) == before


@pytest.mark.e2e
def test_a_run_says_what_makes_its_figures_too_good(cli, world: Path) -> None:
    Image.open("photos/images/p2.png").save("photos/images/p6.png", compress_level=0)
    done = cli("run", "photos.yaml", "--out", "out")
    assert done.code == 0, done.err
    assert "note 1 image of test is also in train, pixel for pixel (p6 = train p2): figures become too good" in done.err


@pytest.mark.e2e
def test_names_are_shown_as_they_are_everywhere(cli, world: Path) -> None:
    names = ["<img src=x onerror=alert(1)>", "[red]dog[/red] | $\\frac$", "`tree` **x** [a](http://b)", "&lt;house"]
    Path("photos/classes.txt").write_text("\n".join(f"{k} {name}" for k, name in enumerate(names, 1)))
    recipe = yaml.safe_load(Path("photos.yaml").read_text()) | {
        "name": "<script>alert(2)</script>",
        "about": "<b>bold</b> [link](http://b)",
    }
    recipe["data"]["notes"] = "<u>"
    del recipe["data"]["notes"]
    Path("odd.yaml").write_text(yaml.safe_dump(recipe))
    out = "<i>run"
    assert cli("run", "odd.yaml", "--out", out, "--quiet").code == 0
    done = cli("compare", out, out, "--html", "page.html")
    assert done.code == 0, done.err
    assert cli("predict", out, "-i", "photos/images/p0.png", "-o", "masks").code == 0
    shown = cli("audit", out)
    assert shown.code == 0, shown.out
    for page in (Path(out, "report.html"), Path("page.html")):
        content = page.read_text()
        for tag in ("<img src=x", "<script>alert", "<b>bold", "<i>run"):
            assert tag not in content, page
        assert "&lt;img src=x onerror=alert(1)&gt;" in content, page
    card = Path(out, "MODEL_CARD.md").read_text()
    for tag in ("<img", "<script", "<b>", "<i>", "[red]dog", "**x**", "[a](", "[link]("):
        assert tag not in card
    assert "&lt;img src=x onerror=alert(1)&gt;" in card and "\\|" in card
