"""The script that runs a study: what it starts, what it leaves alone, and the page it writes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from perdure.config.build import check_method
from perdure.config.load import load_recipe
from perdure.metrics.definitions import figure
from perdure.metrics.results import ResultRow, to_csv

ROOT = Path(__file__).parents[1]
STUDIES = sorted((ROOT / "studies").glob("*.yaml"))


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("study", ROOT / "scripts" / "study.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_every_run_of_a_shipped_study_can_start(study: ModuleType, file: Path) -> None:
    plan = yaml.safe_load(file.read_text(encoding="utf-8"))
    runs = study.commands(plan, [], Path("runs"))
    assert len(runs) == len(plan["variants"]) * len(plan["seeds"])
    for (name, seed), words in runs.items():
        assert words[0] == "run" and words[-1] == str(Path("runs") / f"{name}-{seed}")
        recipe = load_recipe(words[1], list(words[2:-2]))
        check_method(recipe)
        assert recipe.seed == seed
    assert all(str(figure(name)) == name for name in plan["figures"])


def test_the_page_has_mean_and_deviation_over_seeds(study: ModuleType, tmp_path: Path) -> None:
    name = "accuracy.all[bg=out]"
    for seed, value in ((1, 50.0), (2, 70.0)):
        folder = tmp_path / f"only-{seed}"
        folder.mkdir()
        rows = [ResultRow(0, "a", None, "", name, 99.0, 5), ResultRow(1, "b", None, "", name, value, 5)]
        (folder / "results.csv").write_text(to_csv(rows))
        (folder / "environment.json").write_text(json.dumps({"perdure": "0", "torch": "1", "python": "3"}))
    plan = {"title": "T", "recipe": "r", "seeds": [1, 2], "figures": [name], "variants": {"only": ["a=1"]}, "file": "f"}
    text = study.page(plan | {"notes": ["as it is"]}, tmp_path)
    assert "| only | 60.0 ± 14.1 |" in text
    assert "| only | `a=1` |" in text and "- as it is" in text and "seeds (1, 2)" in text


def test_the_page_of_one_seed_has_each_class_by_several_figures(study: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "only-1"
    folder.mkdir()
    rows = [ResultRow(0, "a", None, "", "wcd", 70.0, 5)]
    rows += [ResultRow(0, "a", 1, "liver", name, value, 5) for name, value in (("dice.cases", 81.0), ("hd95[mm]", 4.2))]
    (folder / "results.csv").write_text(to_csv(rows))
    (folder / "environment.json").write_text(json.dumps({"perdure": "0", "torch": "1", "python": "3"}))
    plan = {"title": "T", "recipe": "r", "seeds": [1], "figures": ["wcd"], "variants": {"only": []}, "file": "f"}
    text = study.page(plan | {"by_class": ["dice.cases", "hd95[mm]"]}, tmp_path)
    assert "one seed (1)." in text and "| only | 70.0 |" in text
    (first, second) = text.split("` of each class.")[1:]
    assert "| | `liver` |" in first and "| only | 81.0 |" in first and "| only | 4.2 |" in second


def test_differences_are_paired_by_seed(study: ModuleType, tmp_path: Path) -> None:
    name = "accuracy.all[bg=out]"
    for variant, values in {"low": (10.0, 30.0), "high": (15.0, 36.0)}.items():
        for seed, value in enumerate(values, 1):
            folder = tmp_path / f"{variant}-{seed}"
            folder.mkdir()
            (folder / "results.csv").write_text(to_csv([ResultRow(0, "a", None, "", name, value, 5)]))
            (folder / "environment.json").write_text(json.dumps({"perdure": "0", "torch": "1", "python": "3"}))
    plan = {"title": "T", "recipe": "r", "seeds": [1, 2], "figures": [name], "file": "f", "reference": "low"}
    text = study.page(plan | {"variants": {"low": [], "high": []}}, tmp_path)
    assert "| low | 20.0 ± 14.1 |" in text and "| high | 25.5 ± 14.8 |" in text
    assert "| high | +5.5 ± 0.7 |" in text.partition("Paired differences from low")[2]


def test_the_page_says_that_figures_are_of_the_validation_set(study: ModuleType, tmp_path: Path) -> None:
    name = "accuracy.all[bg=out]"
    rows = [ResultRow(0, "a", None, "", name, 50.0, 5, "val")]
    for seed in (1, 2):
        (tmp_path / f"only-{seed}").mkdir()
        (tmp_path / f"only-{seed}" / "results.csv").write_text(to_csv(rows))
        (tmp_path / f"only-{seed}" / "environment.json").write_text('{"perdure": "0", "torch": "1", "python": "3"}')
    plan = {"title": "T", "recipe": "r", "seeds": [1, 2], "figures": [name], "variants": {"only": []}, "file": "f"}
    assert "Figures of the **validation** set" in study.page(plan, tmp_path)
    (tmp_path / "only-2" / "results.csv").write_text(to_csv([row._replace(split="test") for row in rows]))
    with pytest.raises(SystemExit, match="some on validation images"):
        study.page(plan, tmp_path)


def test_a_finished_run_is_left_alone_and_a_failing_one_stops_the_study(
    study: ModuleType, tmp_path: Path, star_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    class Failed:
        returncode, stderr = 2, "error: no"

    monkeypatch.setattr(study.subprocess, "run", lambda line, **_: started.append(line) or Failed)
    study.run(["run", "x", "--out", str(star_run)])
    assert not started
    with pytest.raises(SystemExit):
        study.run(["run", "x", "--out", str(tmp_path / "new")])
    assert started[0][-2:] == ["--quiet", "--resume"]
