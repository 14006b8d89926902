"""CLIP-CISS from the command line: a killed run ends with the same bytes, the audit lists text, names predict."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perdure.config.load import parse_recipe
from perdure.errors import UsageError
from perdure.experiment import run_experiment
from perdure.kept.ledger import read_ledger
from perdure.metrics.figures import evaluate
from perdure.metrics.results import gather_results
from perdure.predict import Trained, with_names
from perdure.run_folder import RunFolder

sys.path.insert(0, str(Path(__file__).parent))
from kills import announce, assert_same, at, child, content, kill

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

TINY: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "data": {"name": "digits", "size": 32, "train": 14, "val": 2, "test": 4},
    "stream": {"kind": "class_incremental", "base": 6, "step": 4, "order": "shuffled"},
    "network": {"name": "clip_segmenter", "encoder": "tiny_resnet", "stride": 8, "dim": 16, "layers": 1, "heads": 2},
    "augment": {"crop": 32, "short_edges": [24, 32], "jitter": True},
    "evaluate": {"batch_size": 4},
    "method": {"name": "clip_ciss", "pseudo": "reference"},
    "training": {"optimizer": "adamw", "steps": 3, "batch_size": 4, "lr": 0.003, "schedule": "warmup_poly",
                 "warmup_steps": 2, "clip": 35},
    "engine": {"threads": 1, "trackers": [], "save_seconds": 0, "device": "cpu"},
    "report": {"samples": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERDURE_CACHE", str(out.parent / "cache"))
        run_experiment(parse_recipe(TINY, "tiny"), out, quiet=True)
    return out


@pytest.mark.parametrize("moment", ["saved 0.0.2", "save 1.0.1", "saved 1.0.2", "replaced 01-04/ledger.json"])
def test_a_killed_run_ends_with_the_same_bytes(
    tmp_path: Path, finished: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERDURE_CACHE", str(finished.parent / "cache"))
    moment = moment.replace("01-04", next(p.name for p in sorted((finished / "tasks").iterdir()) if p.name[:2] == "01"))
    out = tmp_path / "run"

    def work() -> None:
        announce(at(moment, 1, kill))
        run_experiment(parse_recipe(TINY, "tiny"), out, quiet=True)

    assert child(work)[0] == -signal.SIGKILL
    assert child(lambda: run_experiment(parse_recipe(TINY, "tiny"), out, resume=True, quiet=True) and None)[0] == 0
    assert_same(out, content(finished))


def test_the_ledger_holds_the_text_table_and_the_figures_hold_forward_transfer(
    finished: Path, cli: Callable[..., Any]
) -> None:
    first, second = (read_ledger(folder)["items"] for folder in RunFolder(finished).sealed())
    (text,) = (item for item in second if item["name"] == "text")
    assert text["bytes"] == 10 * 16 * 4 and text["per_class_bytes"] == 64 and not text["patient_data"]
    assert [item["name"] for item in first][:2] == ["weights", "text"]
    audited = cli("audit", str(finished))
    assert audited.code == 0, audited.err
    assert "text" in audited.out
    results = gather_results(RunFolder(finished).stream(), RunFolder(finished).sealed())
    assert evaluate("fwt", results, 1).value is not None
    assert evaluate("miou.all[bg=ignored]", results, 1).value is not None


def test_predict_takes_classes_by_name(tmp_path: Path, finished: Path, cli: Callable[..., Any]) -> None:
    Image.fromarray(np.full((40, 52, 3), 90, np.uint8)).save(tmp_path / "photo.png")
    given = ["predict", str(finished), "-i", str(tmp_path / "photo.png"), "-o"]
    done = cli(*given, str(tmp_path / "out"), "--classes", "apple, small pear")
    assert done.code == 0, done.err
    assert "into 12 classes" in done.err
    listed = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert [(one["id"], one["name"]) for one in listed[-2:]] == [(11, "apple"), (12, "small pear")]
    known = cli(*given, str(tmp_path / "again"), "--classes", "seven")
    assert known.code == 2 and "'seven' is learned already" in known.err
    alike = cli(*given, str(tmp_path / "again"), "--classes", "Seven")
    assert alike.code == 2 and "both called" in alike.err
    assert not (tmp_path / "again").exists()


def test_a_class_that_the_stream_knows_keeps_its_id(finished: Path) -> None:
    model = Trained.open(finished, "cpu")
    space, ids = with_names(model.space, model.seen[:-1], [model.space.name(model.seen[-1]), "pear", "pear"])
    assert ids == (model.seen[-1], 11) and len(space) == 11
    with pytest.raises(UsageError, match="is learned already"):
        with_names(model.space, model.seen, ["zero"])
