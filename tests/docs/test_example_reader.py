"""The worked example of docs/adding-your-data.md: the page shows the file, and the file works."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

READER = "examples.color_masks:open_color_masks"
PAINT = np.array([[0, 0, 0], [250, 10, 10], [10, 250, 10], [10, 10, 250]], np.uint8)
RECIPE = """\
name: painted
seed: 1
data: {name: "examples.color_masks:open_color_masks", root: painted}
stream: {base: 2, step: 1}
network: {backbone: tiny_resnet, tiny_channels: [4, 4, 4, 4], output_stride: 4, width: 8, dilations: [1]}
augment: {crop: 32}
evaluate: {size: null}
method: finetune
training: {epochs: 1, batch_size: 4}
engine: {device: cpu, threads: 1, trackers: []}
report: {samples: 1}
"""


@pytest.fixture
def here(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a user: `painted` and `examples`."""
    draw = np.random.Generator(np.random.PCG64(0))
    for split, count in (("train", 4), ("test", 2)):
        for part in ("images", "masks"):
            (tmp_path / "painted" / split / part).mkdir(parents=True)
        for k in range(count):
            labels = np.kron(draw.permutation(4).reshape(2, 2), np.ones((18, 20), int))
            Image.fromarray(PAINT[labels]).save(tmp_path / f"painted/{split}/masks/{split}{k}.png")
            pixels = draw.integers(0, 255, (36, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"painted/{split}/images/{split}{k}.png")
    (tmp_path / "painted/colors.csv").write_text(
        "name,red,green,blue\nfield,0,0,0\nred,250,10,10\ngreen,10,250,10\nblue,10,10,250\n"
    )
    (tmp_path / "painted.yaml").write_text(RECIPE)
    (tmp_path / "examples").symlink_to(root / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])  # what --allow-code adds is taken away again
    return tmp_path


def test_page_shows_the_file(root: Path) -> None:
    code = (root / "examples" / "color_masks.py").read_text(encoding="utf-8")
    page = (root / "docs" / "adding-your-data.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert shown == [code], "docs/adding-your-data.md must show examples/color_masks.py as it is"
    assert len(code.splitlines()) < 90


def test_check_run_and_predict(here: Path, cli: Callable[..., Any]) -> None:
    done = cli("check", READER, "painted", "--allow-code", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["ok"] and list(found["classes"].values()) == ["field", "red", "green", "blue", "ignore"]
    assert found["splits"]["train"]["pixels"]["1"] == 4 * 18 * 20
    done = cli("check", "painted.yaml", "data.validation=2", "--allow-code")
    assert done.code == 0 and "the recipe can run" in done.out, done.err
    done = cli("run", "painted.yaml", "--allow-code", "--out", "run", "--quiet")
    assert done.code == 0, done.err
    # a prediction needs no reader, so that nothing has to be allowed
    done = cli("predict", "run", "-i", "painted/test/images", "-o", "out")
    assert done.code == 0, done.err
    assert cli("audit", "run").code == 0


def test_what_it_says(here: Path, cli: Callable[..., Any]) -> None:
    Image.new("RGB", (40, 36), (1, 2, 3)).save("painted/test/masks/test1.png")
    done = cli("run", "painted.yaml", "--allow-code", "--out", "run", "--quiet")
    assert done.code == 1 and "test1.png has a colour that colors.csv lacks" in done.err
    assert not Path("run").exists()
    done = cli("run", "painted.yaml", "--allow-code", "--out", "run", "data.patient=true")
    assert done.code == 2 and "no option 'patient'" in done.err and "did you mean 'patients'" in done.err
    done = cli("run", "painted.yaml", "--out", "run")
    assert done.code == 2 and "names code outside of Perdure" in done.err and "--allow-code" in done.err
