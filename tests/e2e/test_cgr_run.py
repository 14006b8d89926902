"""A whole run of CGR from the command line: its folder passes the audit, and other methods replay by a setting."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("nnunetv2")
pytestmark = pytest.mark.e2e
DATA = [f"stream.tasks.{n}.data.{key}={value}" for n in (1, 2, 3) for key, value in (("train", 4), ("test", 1))]
TINY = ["volumes.size=16", "training.steps=2", "training.batch_size=4", "report.samples=1", "engine.threads=1"]
GENERATOR = ["generator.size=smoke", "generator.steps=2", "generator.batch_size=4", "generator.text_width=8"]
PAIRS = ["generator.tokens=2", "pairs.count=3", "pairs.batch=2", "pairs.steps=2", "pairs.sampler=dpm"]
OWN = [f"method.{setting}" for setting in (*GENERATOR, *PAIRS)]


@pytest.fixture(autouse=True)
def _few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perdure.methods.cgr.generator.LOOKS", 8)


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
