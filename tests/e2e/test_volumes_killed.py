"""Volumes that arrive one after another: `run`, `add`, `add`, each killed somewhere, end with the bytes of the whole.

The folders of earlier data sets stay, so that their test cases are measured; see test_add.py for those that are gone.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perdure.adding import Addition, extended
from perdure.audit.audit import audit
from perdure.config.build import build_experiment
from perdure.config.load import parse_recipe
from perdure.data.dataset import Draw
from perdure.data.volumes.extra import need
from perdure.experiment import run_experiment
from perdure.report import page
from perdure.run_folder import RunFolder

sys.path.insert(0, str(Path(__file__).parent))
from kills import announce, assert_same, at, child, content, halve_and_kill, kill

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]
pytest.importorskip("nnunetv2", reason="needs the extra 'volumes'")

SETS = ("organs", "vessels", "lesions")


def section(name: str) -> dict[str, Any]:
    return {"name": name, "data": {"name": "phantoms", "kind": "torso", "set": name, "size": 32, "train": 2, "test": 1}}


def recipe(*names: str) -> dict[str, Any]:
    return {
        "name": "tiny3d",
        "seed": 3,
        "stream": {"kind": "data_sets", "tasks": [section(name) for name in names]},
        "volumes": {
            "plan": "given",
            "spacing": [8, 10, 10],
            "patch": [8, 16, 16],
            "normalisation": "zscore",
            "overlap": 0,
        },
        "network": {"name": "residual_unet", "widths": [4, 8]},
        "method": {"name": "star"},
        "training": {"steps": 2, "later_steps": 2, "batch_size": 2, "lr": 0.01, "optimizer": "adamw"},
        "engine": {"threads": 1, "trackers": [], "save_seconds": 0, "device": "cpu"},
        "report": {"samples": 1},
    }


def learn(out: Path, number: int, say: Callable[[str], None] | None = None) -> tuple[int, str]:
    """`perdure run` of the first set, or `perdure add` of a later one, in a child; the same call again goes on."""

    def work() -> None:
        if say is not None:
            announce(say)
        if number == 0:
            made = parse_recipe(recipe(SETS[0]), "tiny3d")
        else:
            own = [f"data.{key}={value}" for key, value in section(SETS[number])["data"].items() if key != "name"]
            made = extended(RunFolder(out), Addition("phantoms", SETS[number], overrides=own))
        run_experiment(made, out, resume=True, quiet=True)

    return child(work)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], list[Path]]:
    """Files of the whole stream in one run that nobody disturbed, and copies of a run after none, one, two sets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERDURE_CACHE", str(tmp_path_factory.mktemp("cache")))
        # here, for all children: nnU-Net and what it brings take seconds to import
        stream = build_experiment(parse_recipe(recipe(SETS[0]), "tiny3d")).stream
        with stream.opened(stream.tasks[0]) as task:
            assert task.data is not None and task.data.prepare is not None
            task.data.prepare(tmp_path_factory.mktemp("warm"), lambda: None)
            assert len(task.train()[Draw(0, 1)].image) == 1
        need("monai.metrics.utils")
        out = tmp_path_factory.mktemp("whole") / "run"
        status, text = child(lambda: run_experiment(parse_recipe(recipe(*SETS), "tiny3d"), out, quiet=True) and None)
        assert status == 0, text
        page.write_report(out)  # loads matplotlib and the templates here, for all children
        grown = tmp_path_factory.mktemp("grown")
        copies = [grown / "nothing"]
        for number in range(2):
            run = grown / "run"
            status, text = learn(run, number)
            assert status == 0, text
            copies.append(grown / f"after-{number}")
            shutil.copytree(run, copies[-1])
    return content(out), copies


MOMENTS = [  # number of the data set, what is announced, for the how-manieth time, what happens
    (0, "replace run/recipe.yaml", 1, halve_and_kill),
    (0, "replace organs/working.json", 1, kill),
    (0, "replace organs/00000.image.b2nd", 1, halve_and_kill),
    (0, "replaced organs/00000.places.npz", 1, kill),
    (0, "replaced organs/00001.label.b2nd", 1, kill),
    (0, "step 1", 1, kill),
    (0, "saved 0.1.1", 1, kill),
    (0, "replace 00-organs/weights.safetensors", 1, halve_and_kill),
    (0, "replaced 00-organs/done", 1, kill),
    (0, "rmtree 00-organs", 1, kill),
    (1, "replace run/stream.json", 1, halve_and_kill),
    (1, "replaced run/stream.json", 1, kill),
    (1, "replace before/00000.npz", 1, halve_and_kill),
    (1, "replaced before/00000.npz", 1, kill),
    (1, "replaced vessels/00000.image.b2nd", 1, kill),
    (1, "saved 1.1.1", 1, kill),
    (1, "replace 01-vessels/changes.json", 1, halve_and_kill),
    (1, "replaced 01-vessels/ledger.json", 1, kill),
    (1, "replaced run/results.json", 1, kill),
    (2, "replace run/recipe.yaml", 1, kill),
    (2, "replace lesions/00001.label.b2nd", 1, halve_and_kill),
    (2, "step 2", 1, kill),
    (2, "replaced 02-lesions/done", 1, kill),
    (2, "replace run/report.html", 1, halve_and_kill),
]


@pytest.mark.parametrize(
    ("number", "moment", "count", "how"), MOMENTS, ids=[f"{SETS[m[0]]}-{m[1].split('/')[-1]}" for m in MOMENTS]
)
def test_killed_while_a_data_set_is_learned(
    tmp_path: Path,
    whole: tuple[dict[str, bytes], list[Path]],
    number: int,
    moment: str,
    count: int,
    how: Callable[[str], None],
) -> None:
    reference, copies = whole
    out = tmp_path / "run"
    if number:
        shutil.copytree(copies[number], out)
    status, text = learn(out, number, at(moment, count, how))
    assert status == -signal.SIGKILL, text or "the moment never came"
    for later in range(number, 3):
        status, text = learn(out, later)
        assert status == 0, text
    assert_same(out, reference)
    assert not (out / "working").exists()


def test_a_run_that_grew_passes_the_audit(whole: tuple[dict[str, bytes], list[Path]]) -> None:
    found = audit(whole[1][2])
    assert found.passed, found.problems
