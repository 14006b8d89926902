"""Runs of other methods with a past, from the command line: what their folders keep, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perdure.files import read_tensors

pytestmark = pytest.mark.e2e
DATA = [f"stream.tasks.{n}.data.{key}={value}" for n in (1, 2, 3) for key, value in (("train", 4), ("test", 1))]
TINY = ["volumes.size=16", "training.steps=2", "training.batch_size=4", "report.samples=1", "engine.threads=1"]
NETWORK = ["network.widths=[8, 8, 8]", "evaluate.batch_size=4", "engine.trackers=[]"]

IMPRESSIONS = [
    "method.replay=impressions",
    "method.impressions.per_class=2",
    "method.impressions.batch=4",
    "method.impressions.steps=3",
    "method.impressions.least_dice=0",
    "method.impressions.patch=8",
]


def _run(cli: Callable[..., Any], tmp_path: Path, method: str, *past: str) -> tuple[Path, list[Any]]:
    """A finished run, and its command."""
    pytest.importorskip("nnunetv2")
    command = ["run", "cgr/phantoms", f"method={method}", *past, *DATA, *TINY, *NETWORK]
    command += ["--out", tmp_path / "run", "--quiet"]
    done = cli(*command)
    assert done.code == 0, done.err
    return tmp_path / "run", command


@pytest.mark.parametrize("method", ["lwf", "star"])
def test_exemplars_are_listed_as_raw_data_and_a_second_command_changes_nothing(
    cli: Callable[..., Any], tmp_path: Path, method: str
) -> None:
    run, command = _run(cli, tmp_path, method, "method.replay=exemplars", "method.exemplars.per_task=2")
    ledger = json.loads((run / "tasks" / "02-prostate" / "ledger.json").read_text())
    items = {item["name"]: item for item in ledger["items"] if item["kind"] == "exemplars"}
    assert list(items) == ["exemplars-cardiac", "exemplars-fundus", "exemplars-prostate"]
    assert all(len(item["files"]) == 2 and "real training samples" in item["made_from"] for item in items.values())
    one = read_tensors(run / items["exemplars-cardiac"]["files"][0]["file"])
    assert one["image"].shape[1:] == one["label"].shape == (16, 16)
    assert json.loads((run / "tasks" / "02-prostate" / "numbers.json").read_text())["replayed"] == 4
    audit = cli("audit", run)
    assert audit.code == 0, audit.out + audit.err
    assert "raw training samples (exemplars) are kept" in audit.out
    before = {path: path.read_bytes() for path in (run / "kept").rglob("*.safetensors")}
    assert cli(*command, "--resume").code == 0
    assert before == {path: path.read_bytes() for path in (run / "kept").rglob("*.safetensors")}


@pytest.mark.parametrize("method", ["finetune", "lwf", "star"])
def test_of_impressions_statistics_stay_and_no_files(cli: Callable[..., Any], tmp_path: Path, method: str) -> None:
    run, _ = _run(cli, tmp_path, method, *IMPRESSIONS)
    ledger = json.loads((run / "tasks" / "02-prostate" / "ledger.json").read_text())
    kinds = {item["name"]: item["kind"] for item in ledger["items"]}
    assert {
        "class-means": "statistics",
        "impression-statistics": "statistics",
        "previews": "synthetic",
    }.items() <= kinds.items()
    assert not list((run / "kept").rglob("*.safetensors"))
    assert not any(
        f"memory.{part}" in str(item["tensors"]) for item in ledger["items"] for part in ("images", "labels")
    )
    # two of each of the three classes of the first task and the two of the second
    assert json.loads((run / "tasks" / "02-prostate" / "numbers.json").read_text())["replayed"] == 10
    audit = cli("audit", run)
    assert audit.code == 0, audit.out + audit.err
    assert "impression" in (run / "report.html").read_text()


def test_impressions_of_few_patients_are_refused_before_training(world: Path, cli: Callable[..., Any]) -> None:
    done = cli("run", "photos.yaml", "data.patients=true", *IMPRESSIONS, "--out", "run", "--quiet")
    assert done.code == 1 and "Traceback" not in done.err
    assert "has 5 training images of patients, but 'finetune' keeps their mean" in done.err
    assert not list(world.glob("run/tasks/*"))


def test_a_later_task_of_few_patients_without_new_classes_is_refused_before_training(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    draw = np.random.default_rng(0)
    for name, count in (("many", 6), ("few", 2)):
        for split in ("train", "test"):
            for part, channels in (("images", (3,)), ("masks", ())):
                folder = tmp_path / name / split / part
                folder.mkdir(parents=True)
                for k in range(count):
                    Image.fromarray(draw.integers(0, 2, (16, 16, *channels), np.uint8)).save(folder / f"{split}{k}.png")
        (tmp_path / name / "classes.txt").write_text("1 organ\n")
    tasks = [{"name": name, "data": {"name": "folders", "root": name, "patients": True}} for name in ("many", "few")]
    stream = {"kind": "data_sets", "root": str(tmp_path), "tasks": tasks}
    recipe = {"name": "scans", "about": "one organ, twice", "stream": stream, "method": {"name": "finetune"}}
    recipe |= {"volumes": {"view": "slices", "size": 16}, "network": {"name": "unit_unet", "widths": [8, 8, 8]}}
    (tmp_path / "scans.yaml").write_text(json.dumps(recipe))
    settings = [*IMPRESSIONS, "privacy.min_images=5", "method.exemplars.per_task=3"]
    found = cli("check", tmp_path / "scans.yaml", *settings)
    assert found.code == 1 and "the task 'few' has 2 training images of patients" in found.out
    assert "method.exemplars is set, but not used: method.replay is impressions, not exemplars" in found.out


@pytest.mark.parametrize("method", ["finetune", "lwf"])
def test_impressions_where_classes_come_again(cli: Callable[..., Any], tmp_path: Path, method: str) -> None:
    run, _ = _run(cli, tmp_path, method, *IMPRESSIONS, "stream.tasks.3.data.kind=cardiac")
    items = json.loads((run / "tasks" / "02-prostate" / "ledger.json").read_text())["items"]
    # four training images in each task; in few of them a cup has the pixels of a region
    assert [item["from_images"] for item in items if item["name"] == "class-means"] in ([1], [2], [3], [4])
    audit = cli("audit", run)
    assert audit.code == 0, audit.out + audit.err


@pytest.mark.parametrize("words", [["method=cgr"], ["method=lwf", *IMPRESSIONS]], ids=["cgr", "lwf"])
def test_batches_without_room_for_the_past_are_refused_at_once(
    cli: Callable[..., Any], tmp_path: Path, words: list[str]
) -> None:
    done = cli("run", "cgr/phantoms", *words, *DATA, "training.batch_size=1", "--out", tmp_path / "run", "--quiet")
    assert done.code == 2 and "a batch of 1 cannot hold a real and a replayed sample" in done.err
    assert not (tmp_path / "run").exists()
