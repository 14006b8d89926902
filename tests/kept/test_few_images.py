"""A mean of few images of patients is a picture of them: it is refused before training, and found by the audit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from perdure.audit.audit import audit
from perdure.errors import DataError, RunError
from perdure.kept.items import Kept
from perdure.kept.ledger import read_ledger, task_folder, write_ledger
from perdure.kept.method_state import weight_names, write_kept

RECIPE = """\
name: scans
data: {name: class_folders, root: %s, channels: 1, patients: true}
stream: {base: 1, step: 1}
network: {name: cosine_resnet, size: small, norm: continual}
augment: {crop: 32, flip: 0.0, mean: [0], std: [1]}
method: {name: ccsi, per_class: 4, previews: 1, synthesis: {steps: 2, warmup: 1, group_size: 4, groups_at_once: 1}}
training: {epochs: 1, later_epochs: 1, batch_size: 4, lr: 0.01, momentum: 0, freeze_norm: false}
engine: {device: cpu, threads: 1, trackers: []}
report: {samples: 0}
"""


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """A recipe for a data set of patients with 1 image of the class ``rare`` and 6 of ``common``."""
    draw = np.random.Generator(np.random.PCG64(3))
    for name, count in (("common", 6), ("rare", 1)):
        for split, images in (("train", count), ("test", 2)):
            folder = tmp_path / "scans" / split / name
            folder.mkdir(parents=True)
            for k in range(images):
                Image.fromarray(draw.integers(0, 255, (32, 32), np.uint8)).save(folder / f"{name}{k}.png")
    (tmp_path / "scans.yaml").write_text(RECIPE % (tmp_path / "scans"))
    return tmp_path / "scans.yaml"


def test_a_class_of_one_image_is_refused_before_training(scans: Path, cli, tmp_path: Path) -> None:
    done = cli("run", scans, "privacy.min_images=5", "--out", tmp_path / "run", "--quiet")
    assert done.code == 1
    assert "the class 'rare' has 1 training images of patients, but 'ccsi' keeps their mean" in done.err
    assert "at least 5" in done.err and "privacy.min_images" in done.err
    assert not (tmp_path / "run").exists()
    checked = cli("check", scans, "privacy.min_images=5")
    assert checked.code == 1 and "the class 'rare' has 1 training images of patients" in checked.out
    assert "the recipe cannot run" in checked.out


def test_copies_of_an_image_count_once(scans: Path, cli, tmp_path: Path) -> None:
    content = (tmp_path / "scans/train/rare/rare0.png").read_bytes()
    for k in range(1, 20):
        (tmp_path / f"scans/train/rare/copy{k}.png").write_bytes(content)
    done = cli("run", scans, "privacy.min_images=5", "--out", tmp_path / "run", "--quiet")
    assert (done.code, "the class 'rare' has 1 training images of patients" in done.err) == (1, True), done.err


def test_by_default_twenty_are_needed(scans: Path, cli, tmp_path: Path) -> None:
    done = cli("run", scans, "--out", tmp_path / "run", "--quiet")
    assert (done.code, "'common' has 6" in done.err, "at least 20" in done.err) == (1, True, True)
    assert cli("run", scans, "privacy.min_images=4", "--out", tmp_path / "run").code == 2


def test_other_data_may_be_averaged_as_the_author_likes(scans: Path, cli, tmp_path: Path) -> None:
    """And the ledger says from how many images; marked as patients', the same run fails the audit."""
    run = tmp_path / "run"
    done = cli("run", scans, "data.patients=false", "--out", run, "--quiet")
    assert done.code == 0, done.err
    assert audit(run).problems == []
    means = [i["from_images"] for i in audit(run).items if i["name"] == "means"]
    assert means == [6, 1]  # over all classes so far
    table = cli("audit", run).out
    assert re.search(r"means\s*│ statistics │ [\d,]+\s*│ [\d,]+\s*│ 1 ", table), table
    for path in (*run.glob("tasks/*/ledger.json"), run / "stream.json"):
        path.write_text(path.read_text().replace('"patients": false', '"patients": true'))
    told = [p for p in audit(run).problems if "'means'" in p and "averages of only" in p]
    assert len(told) == 2
    assert "'means' holds pictures that are averages of only 1 images of patients, fewer than 20" in told[1]
    assert cli("report", run).code == 0
    assert 'id="pictures"' not in (run / "report.html").read_text()


def test_enough_images_pass(scans: Path, cli, tmp_path: Path) -> None:
    draw = np.random.Generator(np.random.PCG64(4))
    for k in range(1, 6):
        Image.fromarray(draw.integers(0, 255, (32, 32), np.uint8)).save(tmp_path / f"scans/train/rare/r{k}.png")
    run = tmp_path / "run"
    done = cli("run", scans, "privacy.min_images=6", "--out", run, "--quiet")
    assert done.code == 0, done.err
    done = cli("audit", run)
    assert done.code == 0, done.out
    assert "come from at least 6 images of each class" in " ".join(done.out.split())
    ledger = json.loads((run / "tasks/01-rare/ledger.json").read_text())
    assert (ledger["min_images"], ledger["patients"]) == (6, True)
    assert [i["from_images"] for i in ledger["items"] if i["name"] == "means"] == [6]


STATE = {"means": torch.zeros(2, 1, 16, 16, dtype=torch.uint8), "moments": torch.zeros(2, 3, 4)}


def means(from_images: int | None, keys: tuple[str, ...] = ("means",), **more: object) -> Kept:
    return Kept("means", "statistics", keys, "mean of each class", from_images=from_images, **more)  # type: ignore


def test_what_a_method_must_say(tmp_path: Path) -> None:
    folder = task_folder(tmp_path, 0, "a")
    rest = Kept("moments", "statistics", ("moments",), "no picture: sides of 3 and 4")
    with pytest.raises(RunError, match="not from how many images they come"):
        write_kept(folder, STATE, [means(None), rest], 2)
    with pytest.raises(DataError, match="averages of only 19 images of patients; at least 20"):
        write_kept(folder, STATE, [means(19), rest], 2, least=20)
    assert not folder.exists()
    entries = write_kept(folder, STATE, [means(25), rest], 2, least=20)
    assert [entry["from_images"] for entry in entries] == [None, 25, None]


def test_the_least_number_of_all_tasks_counts(tmp_path: Path) -> None:
    one, two = (task_folder(tmp_path, k, "t") for k in (0, 1))
    rest = Kept("moments", "statistics", ("moments",), "-")
    write_ledger(one, "t", write_kept(one, STATE, [means(7), rest], 2), patients=False)
    write_ledger(two, "t", write_kept(two, STATE, [means(30), rest], 2, before=one), patients=False)
    assert [e["from_images"] for e in read_ledger(two)["items"]] == [None, 7, None]


class Hiding(torch.nn.Module):
    """A network, and a buffer that no item names."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4))
        self.register_buffer("images", torch.rand(5, 1, 16, 16))


@pytest.mark.parametrize("place", ["images", "network.1.images", "network.1.running_mean"])
def test_a_buffer_that_nothing_names_is_no_weight(place: str, tmp_path: Path) -> None:
    method = Hiding()
    owner, _, name = place.rpartition(".")
    part = method.get_submodule(owner)
    pictures = method.images
    del method.images
    part.register_buffer(name, pictures) if name == "images" else setattr(part, name, pictures)
    own = weight_names(method)
    assert "network.0.weight" in own and place not in own
    with pytest.raises(RunError, match="would be kept, but no kept item names it") as raised:
        write_kept(task_folder(tmp_path, 0, "a"), method.state_dict(), [], 1, own=own)
    assert place.rpartition(".")[0] in str(raised.value)
    assert not (tmp_path / "tasks").exists()


def test_networks_consist_of_weights() -> None:
    assert weight_names(Hiding()) == {f"network.{k}" for k in (
        "0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"
    )}  # fmt: skip
