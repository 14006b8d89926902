"""The same structure from one scanner after another: how good earlier models are on data that they have not met."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from perdure.config.build import build_experiment, build_method
from perdure.engine.machine import Machine
from perdure.metrics.cases import MEASURES
from perdure.metrics.evaluate import count
from perdure.metrics.figures import evaluate
from perdure.metrics.results import gather_results
from perdure.run_folder import RunFolder
from perdure.sealing import begin, restore_sealed

pytestmark = pytest.mark.e2e
pytest.importorskip("nnunetv2")

NAMES = ("first", "second", "third")


def recipe(tasks: int) -> str:
    sets = [
        {"name": name, "data": {"name": "phantoms", "kind": "fundus", "size": 32, "train": 3, "test": 2, "source": n}}
        for n, name in enumerate(NAMES[:tasks])
    ]
    return yaml.safe_dump(
        {
            "name": "scanners",
            "stream": {"kind": "data_sets", "elsewhere": "absent", "tasks": sets},
            "volumes": {"view": "slices", "size": 32, "augment": "none"},
            "network": {"name": "residual_unet", "widths": [4, 8]},
            "method": "finetune",
            "training": {"optimizer": "adamw", "steps": 6, "later_steps": 4, "batch_size": 2, "lr": 0.01},
            "engine": {"device": "cpu", "threads": 1, "trackers": []},
            "report": {"samples": 0},
        }
    )


def test_earlier_models_are_measured_on_new_test_cases_by_run_and_by_add(
    tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, tasks in (("all", 3), ("one", 1)):
        Path(f"{name}.yaml").write_text(recipe(tasks))
    whole = cli("run", "all.yaml", "--out", "whole", "--quiet")
    assert whole.code == 0, whole.err
    assert cli("run", "one.yaml", "--out", "grown", "--quiet").code == 0
    for n in (1, 2):
        added = cli("add", "grown", "--data", "phantoms", "--name", NAMES[n], "--same", "all", "--quiet",
                    "data.kind=fundus", "data.size=32", "data.train=3", "data.test=2", f"data.source={n}")  # fmt: skip
        assert added.code == 0, added.err

    run = RunFolder(Path("whole"))
    sealed, experiment = run.sealed(), build_experiment(run.recipe())
    tasks, seed, machine = experiment.stream.tasks, experiment.recipe.seed, Machine(experiment.recipe.engine)

    def dice(learned: int, on: int) -> float:
        """Dice of a model on a test set from single cases; ``learned`` tasks, 0 for the untrained model."""
        method = build_method(experiment.recipe, tasks[0].preparation)
        if learned:
            restore_sealed(method, tasks, run, sealed[:learned], seed)
        else:
            begin(method, tasks[0], seed)
        method.eval()
        cases = count(method.predict, tasks[on].tests()[NAMES[on]], tasks[0].new, machine, 2, 0).cases
        assert cases is not None and MEASURES[0] == "dice"
        truth, said, both = cases.pixels[:, 1:].astype(float).transpose(2, 0, 1)
        with np.errstate(invalid="ignore"):
            return float(np.nanmean(np.nanmean(200 * both / (truth + said), 0)))

    wanted = {on: [dice(learned, on) for learned in range(on + 1)] for on in (1, 2)}
    for on, folder in ((1, "01-second"), (2, "02-third")):
        numbers = json.loads(Path("whole/tasks", folder, "numbers.json").read_text())
        assert numbers["untrained"] == pytest.approx(wanted[on][0], abs=1e-4)
        assert numbers["earlier"] == pytest.approx(wanted[on][1:], abs=1e-4)
        assert numbers["replayed"] == 0
        for file in ("numbers.json", "weights.safetensors"):
            places = [Path(name, "tasks", folder, file).read_bytes() for name in ("whole", "grown")]
            assert places[0] == places[1], f"{folder}/{file}"
    assert not Path("whole/tasks/00-first/numbers.json").exists()

    results = gather_results(run.stream(), sealed)
    pairs = [wanted[on][t] - wanted[on][0] for on in (1, 2) for t in range(1, on + 1)]
    assert evaluate("e-fwt", results, 2) == (pytest.approx(np.mean(pairs), abs=1e-4), 3)
    assert evaluate("e-fwt", results, 1) == (pytest.approx(pairs[0], abs=1e-4), 1)
    assert evaluate("drr", results, 2) == (0, 2)
    assert "e-fwt" in Path("whole/results.csv").read_text()
    assert cli("audit", "whole").code == 0 and torch.get_num_threads() == 1

    # what the audit lets pass is what the run writes
    place = Path("whole/tasks/02-third/numbers.json")
    numbers = json.loads(place.read_text())
    for change in ({"earlier": numbers["earlier"][:1]}, {"untrained": 1.23456789}, {"name": "A. Miller"}):
        place.write_text(json.dumps({**numbers, **change}, indent=1) + "\n")
        told = cli("audit", "whole")
        assert told.code == 1 and "numbers.json" in told.out
