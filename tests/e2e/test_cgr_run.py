"""A whole run of CGR from the command line: its folder passes the audit, and other methods replay by a setting."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from perdure.config.load import load_recipe
from perdure.config.recipe import Recipe
from perdure.experiment import run_experiment
from perdure.files import TEMPORARY

sys.path.insert(0, str(Path(__file__).parent))
from kills import announce, assert_same, at, child, content, halve_and_kill, kill

pytest.importorskip("diffusers")
pytest.importorskip("nnunetv2")
pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")]
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
DATA = [f"stream.tasks.{n}.data.{key}={value}" for n in (1, 2, 3) for key, value in (("train", 4), ("test", 1))]
TINY = ["volumes.size=16", "training.steps=2", "training.batch_size=4", "report.samples=1", "engine.threads=1"]
GENERATOR = [
    "generator.size=smoke",
    "generator.steps=2",
    "generator.later_steps=2",
    "generator.batch_size=4",
    "generator.text_width=8",
]
PAIRS = ["generator.tokens=2", "pairs.count=3", "pairs.batch=2", "pairs.steps=2", "pairs.sampler=dpm"]
OWN = [f"method.{setting}" for setting in (*GENERATOR, *PAIRS)]


@pytest.fixture(autouse=True)
def _few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perdure.methods.past.LOOKS", 8)


def items(run: Path, task: str) -> dict[str, Any]:
    return {item["name"]: item for item in json.loads((run / "tasks" / task / "ledger.json").read_text())["items"]}


REPLAY = "method.replay=generated"


@pytest.mark.parametrize("method", [[], ["method=lwf", REPLAY], ["method=star", REPLAY]], ids=["cgr", "lwf", "star"])
def test_a_run_keeps_its_pairs_and_passes_the_audit(cli: Callable[..., Any], tmp_path: Path, method: list[str]) -> None:
    run = tmp_path / "run"
    network = ["network.widths=[8, 8, 8]", "evaluate.batch_size=4", "engine.trackers=[]", "stream.order=reversed"]
    done = cli("run", "cgr/phantoms", *method, *DATA, *TINY, *OWN, *network, "--out", run, "--quiet")
    assert done.code == 0, done.err
    first, last = items(run, "00-prostate"), items(run, "02-cardiac")
    assert {"pairs-prostate", "pairs-fundus", "pairs-cardiac", "prompts", "mask-counts", "previews"} <= set(last)
    assert set(first) & set(last) >= {"pairs-prostate"}
    old, new = ({file["file"] for file in listed["pairs-prostate"]["files"]} for listed in (first, last))
    assert len(old) == len(new) == 2 and not old & new
    assert all((run / place).is_file() for place in old | new)  # what an earlier stage trained from stays
    assert (
        last["pairs-cardiac"]["kind"] == "synthetic" and "copies of real images" in last["pairs-cardiac"]["made_from"]
    )
    audit = cli("audit", run)
    assert audit.code == 0, audit.out + audit.err
    again = cli("run", "cgr/phantoms", *method, *DATA, *TINY, *OWN, *network, "--out", run, "--resume", "--quiet")
    assert again.code == 0, again.err


SETTINGS = ["cgr/phantoms", *DATA, *TINY, *OWN, "network.widths=[8, 8, 8]", "evaluate.batch_size=4"]
SETTINGS += ["engine.trackers=[]", "engine.save_seconds=0", "engine.device=cpu"]


def recipe() -> Recipe:
    return load_recipe(SETTINGS[0], SETTINGS[1:])


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("perdure.methods.past.LOOKS", 8)
        run_experiment(recipe(), out, quiet=True)
    return content(out)


def interrupted(out: Path, moment: str, act: Callable[[str], None]) -> tuple[int, str]:
    def work() -> None:
        announce(at(moment, 1, act))
        run_experiment(recipe(), out, quiet=True)

    return child(work)


def ended_alike(out: Path, reference: dict[str, bytes]) -> None:
    status, text = child(lambda: run_experiment(recipe(), out, resume=True, quiet=True) and None)
    assert status == 0, text
    assert_same(out, reference)


PAIR_FILES = ["00-03-pairs/000000.safetensors", "01-04-pairs/000001.safetensors"]
PHASES = {
    "labels": "saved 1.1.0",
    "generator": "saved 1.1.1",
    "training": "saved 1.2.1",
    "pairs of the first task": "saved 1.3.1",
    "pairs of the second task": "saved 1.4.1",
}


@forks
@pytest.mark.parametrize("phase", PHASES)
def test_a_run_killed_in_any_phase_makes_the_same_pairs(
    tmp_path: Path, reference: dict[str, bytes], phase: str
) -> None:
    out = tmp_path / "run"
    assert interrupted(out, PHASES[phase], kill)[0] == -signal.SIGKILL
    ended_alike(out, reference)


@forks
@pytest.mark.parametrize(("file", "act"), [(PAIR_FILES[0], halve_and_kill), (PAIR_FILES[1], kill)])
def test_a_run_killed_while_a_file_of_pairs_is_written_makes_the_same_pairs(
    tmp_path: Path, reference: dict[str, bytes], file: str, act: Callable[[str], None]
) -> None:
    out = tmp_path / "run"
    assert interrupted(out, f"replace {file}", act)[0] == -signal.SIGKILL
    ended_alike(out, reference)


def no_space(text: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@forks
@pytest.mark.parametrize("file", PAIR_FILES)
def test_a_disk_that_is_full_of_pairs_is_told_in_a_line(tmp_path: Path, reference: dict[str, bytes], file: str) -> None:
    out = tmp_path / "run"
    status, text = interrupted(out, f"replace {file}", no_space)
    assert (status, text.startswith("PerdureError: the disk is full: could not write")) == (1, True), text
    assert not list(out.rglob(f"{TEMPORARY}*"))
    ended_alike(out, reference)


def test_the_table_and_the_picture_of_pairs(
    cli: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Path(__file__).parents[2] / "scripts" / "pairs_of_runs.py"
    spec = importlib.util.spec_from_file_location("pairs_of_runs", place)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    run, picture = tmp_path / "run", tmp_path / "pairs.png"
    done = cli("run", *SETTINGS, "--out", run, "--quiet")
    assert done.code == 0, done.err
    capsys.readouterr()
    assert script.main([str(run), str(run), "--picture", str(picture)]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    made = [("cardiac", "1"), ("cardiac", "2"), ("cardiac", "3"), ("fundus", "2"), ("fundus", "3"), ("prostate", "3")]
    assert [(task, stage) for task, stage, *_ in rows] == made
    assert all(dice.endswith("± 0.0") for _, _, dice, *_ in rows)  # of a run and itself
    with Image.open(picture) as drawn:  # six rows of pairs, and one of real images per task
        assert drawn.size[1] * 14 * 16 == drawn.size[0] * 9 * (2 * 16 + 2)


@pytest.mark.parametrize("method", [["method=cgr"], ["method=lwf", REPLAY], ["method=star", REPLAY]])
def test_more_classes_than_a_mask_can_code_are_refused_at_once(cli: Callable[..., Any], method: list[str]) -> None:
    checked = cli("check", "demo", *method, "stream.base=9", "stream.step=1")
    assert checked.code == 2 and "annotates 9 classes; a generator of pairs codes at most 8" in checked.err
    assert cli("check", "demo", *method, "stream.base=8", "stream.step=1").code == 0
