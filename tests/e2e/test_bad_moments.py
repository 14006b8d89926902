"""What goes wrong because of the machine or in the middle of the work: plain lines, and a run that can go on."""

from __future__ import annotations

import errno
import importlib.util
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from perdure.files import TEMPORARY

pytestmark = pytest.mark.e2e


def told(done: Any, code: int, *words: str) -> None:
    """Check that a command failed with one or two plain lines that hold some words."""
    lines = done.err.splitlines()
    assert done.code == code, done.err
    assert len(lines) <= 2 and lines[0].startswith("error: ") and "this is a bug" not in done.err, done.err
    assert all(word in done.err for word in words), done.err


def whole(run: Path) -> None:
    """Check that a run folder holds nothing half-written."""
    assert not list(run.rglob(f"{TEMPORARY}*"))
    assert not (run / "report.html").exists()
    assert not any(
        (folder / "done").exists() and not (folder / "ledger.json").exists() for folder in run.glob("tasks/*")
    )


def test_no_gpu(cli, world: Path, star_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told(cli("run", "tiny.yaml", "engine.device=cuda", "--out", "out"), 2, "engine.device=cuda", "no GPU")
    told(
        cli("predict", star_run, "-i", "photos/images", "-o", "out", "--device", "cuda"),
        2,
        "no GPU",
        "--device auto or cpu",
    )
    assert not Path("out").exists()


def test_tracker_that_is_not_installed(cli, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else found(name, *a))
    told(cli("run", "tiny.yaml", "engine.trackers=[wandb]", "--out", "out"), 2, "wandb", "pip install wandb")
    assert not Path("out").exists()


def test_disk_too_small_for_the_run(cli, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    told(cli("run", "tiny.yaml", "--out", "runs/out"), 1, "needs about 0.1 GB", "0.0 GB free", "--out")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "file", ["recipe.yaml", "state.safetensors", "weights.safetensors", "ledger.json", "results.csv"]
)
def test_disk_full_while_writing(file: str, cli, world: Path, star_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Path.replace

    def full(path: Path, target: Path) -> Path:
        if Path(target).name == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        told(cli("run", "tiny.yaml", "--out", "out", "--quiet"), 1, "the disk is full", file, "--resume")
    whole(Path("out"))
    done = cli("run", "tiny.yaml", "--out", "out", "--quiet", "--resume")
    assert done.code == 0, done.err
    last = "tasks/02-09-10/weights.safetensors"
    assert (Path("out") / last).read_bytes() == (star_run / last).read_bytes()


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limits on file sizes here")
def test_disk_full_in_a_process_of_its_own(world: Path) -> None:
    def at_most_100_kb() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    words = [sys.executable, "-m", "perdure", "run", "tiny.yaml", "--out", "out", "--quiet", "engine.trackers=[]"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, preexec_fn=at_most_100_kb)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the disk is full: could not write out/")
    assert "--resume" in done.stderr and len(done.stderr.splitlines()) == 2
    whole(Path("out"))


def test_another_run_is_at_work(cli, world: Path) -> None:
    Path("out").mkdir()
    with FileLock("out/.lock"):
        told(cli("run", "tiny.yaml", "--out", "out", "--quiet"), 1, "another command is working on the run folder out")
    assert [p.name for p in Path("out").iterdir() if p.name != ".lock"] == []


def test_loss_that_is_not_finite(cli, world: Path) -> None:
    done = cli("run", "tiny.yaml", "training.lr=1e30", "data.train=64", "--out", "out", "--quiet")
    told(done, 1, "'current' is not finite", "training.lr")
    whole(Path("out"))
    assert not Path("out/tasks").exists()


def test_test_images_of_several_sizes_in_a_batch(cli, world: Path) -> None:
    Image.fromarray(np.zeros((40, 36, 3), np.uint8)).save("photos/images/p6.png")
    Image.fromarray(np.ones((40, 36), np.uint8)).save("photos/masks/p6.png")
    for at_once in (2, 1):  # images of one size are predicted together, others on their own
        done = cli("run", "photos.yaml", "--out", f"out{at_once}", "--quiet", f"evaluate.batch_size={at_once}")
        assert done.code == 0, done.err
    results = [Path(f"out{at_once}/results.csv").read_bytes() for at_once in (2, 1)]
    assert results[0] == results[1]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_folder_that_cannot_be_written(cli, world: Path) -> None:
    Path("locked").mkdir(mode=0o555)
    told(cli("run", "tiny.yaml", "--out", "locked/out", "--quiet"), 1, "locked/out", "cannot be written")


GO_ON = "the same command with --resume goes on from here"
STOPS = {
    "list": ("list recipes", "perdure.cli.listing.list_things", "perdure list was stopped", "begins anew"),
    "a check": ("check --data photos", "perdure.cli.check.inspect", "stopped while files were read", "begins anew"),
    "files before a run": (
        "run photos.yaml --out out", "perdure.experiment.survey", "while files were checked, before", GO_ON
    ),
    "the stream of a run": (
        "run photos.yaml --out out", "perdure.experiment.build_experiment", "while the run was made ready", GO_ON
    ),
    "preprocessing": (
        "run tiny.yaml --out out --quiet",
        "perdure.working.WorkingFolder.fill",
        "were prepared; those that are ready stay",
        GO_ON,
    ),
    "training, a second time": (
        "run tiny.yaml --out out --quiet",
        "perdure.engine.engine.Engine.run",
        "were learned, before that was saved",
        GO_ON,
    ),
    "evaluation": (
        "run tiny.yaml --out out --quiet method=finetune",
        "perdure.sealing.count",
        "while the test cases after task 1 (",
        GO_ON,
    ),
    "a model that is loaded": (
        "predict RUN -i photos/images -o out", "perdure.predict.Trained.open", "while the model was loaded", "anew"
    ),
    "prediction": (
        "predict RUN -i photos/images -o out",
        "perdure.predict.predict_files",
        "while images were labelled; whatever is in out is whole",
        "begins anew",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STOPS)
def test_ctrl_c_tells_what_was_under_way(
    name: str, cli, world: Path, star_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    command, place, what, hint = STOPS[name]
    with monkeypatch.context() as patch:
        patch.setattr(place, interrupted)
        told(cli(*(str(star_run) if word == "RUN" else word for word in command.split())), 1, what, hint)
    if name == "preprocessing":  # as the message says
        done = cli(*command.split(), "--resume")
        assert done.code == 0, done.err
