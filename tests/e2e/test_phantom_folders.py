"""Three sets of phantoms drawn on the fly, and the same as folders that arrive one after another: one run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nnunetv2", reason="needs the extra 'volumes'")

pytestmark = pytest.mark.e2e

SETS = {"organs": "Dataset001_Organs", "vessels": "Dataset002_Vessels", "lesions": "Dataset003_Lesions"}
CASES = {"size": 32, "train": 3, "test": 1}
DRAWN = [f"stream.tasks.{place}.data.{key}={value}" for place in (1, 2, 3) for key, value in CASES.items()]
TINY = [
    "network.widths=[4,8]",
    "volumes.spacing=[12,10,10]",
    "volumes.patch=[16,16,16]",
    "training.steps=3",
    "training.later_steps=2",
    "training.batch_size=2",
    "engine.device=cpu",
    "engine.threads=1",
    "engine.trackers=[]",
    "report.samples=0",
]


def learned(run: str) -> dict[str, bytes]:
    """Weights, what else is kept, and the counts of every task, by place."""
    tasks = Path(run, "tasks")
    files = [file for file in sorted(tasks.rglob("*")) if file.suffix == ".safetensors" or file.name == "counts.json"]
    return {file.relative_to(tasks).as_posix(): file.read_bytes() for file in files}


def grown(cli: Callable[..., Any], run: str, place: str, keep: bool) -> None:
    """Learn the three folders one after another; each is deleted after its task, or its training cases alone."""
    earlier: list[str] = []
    for name, folder in SETS.items():
        if name == "organs":
            done = cli("run", "data-sets/torso", "--data", f"{place}/{folder}", "--out", run, "--quiet", *TINY)
        else:
            done = cli("add", run, "--data", f"{place}/{folder}", "--name", name, *earlier, "--quiet")
        assert done.code == 0, done.err
        if keep:
            earlier += ["--earlier", f"{name}={place}/{folder}"]
            for part in ("imagesTr", "labelsTr"):
                shutil.rmtree(f"{place}/{folder}/{part}")
        else:
            shutil.rmtree(f"{place}/{folder}")


def test_folders_one_after_another_are_the_stream_that_is_drawn_on_the_fly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]
) -> None:
    """Files round what is drawn (int16 voxels, spacings of 32 bits), and nothing may depend on that."""
    monkeypatch.chdir(tmp_path)
    drawn = cli("run", "data-sets/torso", "--out", "drawn", "--quiet", *TINY, *DRAWN)
    assert drawn.code == 0, drawn.err
    written = cli("phantoms", "torso", "d", *(word for key, value in CASES.items() for word in (f"--{key}", value)))
    assert written.code == 0, written.err

    shutil.copytree("d", "e")
    grown(cli, "kept", "e", keep=True)
    assert learned("kept").keys() == learned("drawn").keys()
    assert learned("kept") == learned("drawn")

    grown(cli, "gone", "d", keep=False)
    assert not any(Path("d").iterdir())
    weights, without = (
        {place: content for place, content in learned(run).items() if place.endswith(".safetensors")}
        for run in ("kept", "gone")
    )
    assert len(weights) >= len(SETS) and without == weights
    # the test cases of earlier sets went with their folders
    counted = json.loads(Path("gone/tasks/02-lesions/counts.json").read_text())["sets"]
    assert list(counted) == ["lesions"]
    audited = cli("audit", "gone")
    assert audited.code == 0, audited.out
