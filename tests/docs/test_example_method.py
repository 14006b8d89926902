"""The worked example of docs/adding-a-method.md: the page shows the file, and the file works."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from perdure.audit.audit import audit
from perdure.config.build import method_class
from perdure.config.load import parse_recipe
from perdure.experiment import run_experiment
from perdure.metrics.results import read_results

METHOD = "examples.less_forgetting:LessForgetting"
TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"name": "digits", "size": 48, "train": 200, "val": 10, "test": 60},
    "stream": {"base": 2, "step": 2, "order": ["zero", "one", "four", "seven"]},
    "network": {
        "name": "deeplab",
        "backbone": "tiny_resnet",
        "tiny_channels": [16, 24, 32, 48],
        "width": 32,
        "output_stride": 4,
        "dilations": [1, 2],
    },
    "augment": {"crop": 48, "area": [0.8, 1.0], "flip": 0.0, "mean": [0.5] * 3, "std": [0.25] * 3},
    "evaluate": {"size": None, "batch_size": 20},
    "training": {
        "optimizer": "adamw",
        "epochs": 15,
        "batch_size": 8,
        "lr": 0.003,
        "later_lr": 0.0015,
        "neck_lr": 1,
        "classifier_lr": 1,
        "new_classifier_lr": 10,
    },
    "engine": {"device": "cpu", "threads": 1, "trackers": []},
    "report": {"samples": 1},
}
ALL, FORGETTING = "miou.all[bg=in,absent=skip]", "forgetting[max-last]"


@pytest.fixture(autouse=True)
def _threads(at_root: Path) -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def learned(tmp_path: Path) -> Callable[..., dict[tuple[int, str], float]]:
    """Train a method on the tiny stream; figures by task and name."""

    def learn(method: dict[str, Any], **training: Any) -> dict[tuple[int, str], float]:
        recipe = copy.deepcopy(TINY) | {"method": method}
        recipe["training"] |= training
        out = tmp_path / method["name"].rpartition(":")[2]
        run_experiment(parse_recipe(recipe, "tiny"), out, quiet=True)
        return {(r.after_task, r.figure): r.value for r in read_results(out / "results.csv") if r.class_id is None}

    return learn


def test_page_shows_the_file(root: Path) -> None:
    code = (root / "examples" / "less_forgetting.py").read_text(encoding="utf-8")
    page = (root / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert shown[0] == code, "docs/adding-a-method.md must show examples/less_forgetting.py as it is"
    assert len(code.splitlines()) < 100


def test_it_is_a_method() -> None:
    kind = method_class(METHOD)
    assert kind.Options.model_validate({"hold": 2}).model_dump() == {"hold": 2.0}
    assert not kind.sees_all_tasks


@pytest.mark.contract
def test_it_forgets_less_than_finetuning(learned: Callable[..., Any], tmp_path: Path) -> None:
    remembers, forgets = learned({"name": METHOD}), learned({"name": "finetune"})
    assert remembers[0, ALL] == pytest.approx(forgets[0, ALL]), "the first task is the same for both"
    assert remembers[0, ALL] > 40
    assert remembers[1, FORGETTING] < forgets[1, FORGETTING] - 12
    assert remembers[1, ALL] > forgets[1, ALL] + 5
    found = audit(tmp_path / "LessForgetting")
    assert found.passed, found.problems
    assert {item["kind"] for item in found.items} == {"weights", "preview"}


@pytest.mark.contract
def test_terms_are_logged_and_weighted(learned: Callable[..., Any], tmp_path: Path) -> None:
    learned({"name": METHOD, "hold": 0.0}, epochs=1)
    log = (tmp_path / "LessForgetting" / "log.jsonl").read_text(encoding="utf-8")
    assert "current" in log
    assert "hold" in log
