"""The five commands of the README on a folder of pictures, and the picture that is made from run folders."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from perdure.cli.app import app
from perdure.data.readers.digits import open_digits

SMALL = [
    "network.backbone=tiny_resnet",
    "network.weights=random",
    "network.tiny_channels=[4, 4, 8, 8]",
    "network.width=8",
    "network.dilations=[1]",
    "augment.crop=32",
    "evaluate.size=32",
    "training.epochs=1",
    "training.later_epochs=1",
    "engine.device=cpu",
    "report.samples=2",
]
"""What keeps the run below a second; everything else is the example's."""


@pytest.fixture
def here(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `mydata`, `photos` and `examples` as a reader of the README has them."""
    source = open_digits(size=48, train=16, val=1, test=8)
    for split in ("train", "test"):
        for name in source.names(split):
            _save(source.image(split, name).transpose(1, 2, 0), tmp_path / "mydata" / split / "images" / f"{name}.jpg")
            mask = source.mask(split, name)
            _save(np.where(mask <= 3, mask, 0).astype(np.uint8), tmp_path / "mydata" / split / "masks" / f"{name}.png")
    (tmp_path / "mydata" / "classes.txt").write_text("1 zero\n2 one\n3 two\n")
    _save(np.full((40, 56, 3), 90, np.uint8), tmp_path / "photos" / "new.png")
    (tmp_path / "examples").symlink_to(root / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def readme_commands(root: Path) -> list[list[str]]:
    """The block under `Your own data in five commands`."""
    section = (root / "README.md").read_text(encoding="utf-8").partition("## Your own data")[2]
    found = re.search(r"^```sh\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    assert found is not None
    return [shlex.split(line, comments=True)[1:] for line in found[1].splitlines()]


@pytest.mark.e2e
def test_five_commands(here: Path, root: Path) -> None:
    commands = readme_commands(root)
    assert [command[0] for command in commands] == ["check", "check", "run", "predict", "audit"]
    for command in commands:
        asked = [*command[:2], *SMALL, *command[2:], "--quiet"] if command[0] == "run" else command
        if command[:2] == ["check", "examples/own-data.yaml"]:
            asked = [*command, "network.weights=random"]  # ImageNet weights may be out of reach, which is no success
        result = CliRunner().invoke(app, asked)
        assert result.exit_code == 0, f"{command}: {result.output}"
    with Image.open(here / "masks" / "index" / "new.png") as mask:
        assert mask.size == (56, 40)
    names = [c["name"] for c in json.loads((here / "masks" / "classes.json").read_text())]
    assert names == ["background", "zero", "one", "two"]

    spec = importlib.util.spec_from_file_location("picture", root / "scripts" / "picture.py")
    assert spec is not None
    assert spec.loader is not None
    picture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picture)
    assert picture.main(["demo.png", "runs/mine"]) == 0
    with Image.open(here / "demo.png") as drawn:
        assert len(np.unique(np.asarray(drawn.convert("RGB")).reshape(-1, 3), axis=0)) > 50
    assert picture.main(["other.png", "runs/mine", "--scene", "nowhere"]) == 2
    assert not (here / "other.png").exists()
