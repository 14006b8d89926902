"""Runs that keep exemplars, from the command line: the ledger calls them raw data, and the audit says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perdure.files import read_tensors

pytestmark = pytest.mark.e2e
DATA = [f"stream.tasks.{n}.data.{key}={value}" for n in (1, 2, 3) for key, value in (("train", 4), ("test", 1))]
TINY = ["volumes.size=16", "training.steps=2", "training.batch_size=4", "report.samples=1", "engine.threads=1"]
NETWORK = ["network.widths=[8, 8, 8]", "evaluate.batch_size=4", "engine.trackers=[]"]


@pytest.mark.parametrize("method", ["lwf", "star"])
def test_exemplars_are_listed_as_raw_data_and_a_second_command_changes_nothing(
    cli: Callable[..., Any], tmp_path: Path, method: str
) -> None:
    pytest.importorskip("nnunetv2")
    run, keeps = tmp_path / "run", ["method.replay=exemplars", "method.exemplars.per_task=2"]
    command = ["run", "cgr/phantoms", f"method={method}", *keeps, *DATA, *TINY, *NETWORK, "--out", run, "--quiet"]
    done = cli(*command)
    assert done.code == 0, done.err
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
