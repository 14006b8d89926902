"""A whole run on images with a spacing in mm: distances are recorded, reported, audited, and nobody's name is there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from perdure.audit.audit import audit
from perdure.kept.manifest import list_files
from perdure.metrics.cases import read_cases
from perdure.metrics.results import read_results

pytest.importorskip("monai")
READER = '''\
"""Scenes of digits as if they came from a scanner with pixels of 1.5 x 0.5 mm."""

from dataclasses import replace

from perdure.data.case import Geometry
from perdure.data.readers.digits import Digits


class Scanned(Digits):
    def read(self, split, name):
        return replace(super().read(split, name), geometry=Geometry((1.5, 0.5), "mm"))


def open_scanned(size: int = 32, train: int = 24, val: int = 4, test: int = 8):
    return Scanned({"train": train, "val": val, "test": test}, size)
'''
WORDS = ("method=finetune", "--quiet", "--allow-code")
LAST = Path("tasks/02-09-10/cases.csv")


@pytest.fixture(scope="module")
def recipe(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A recipe on these scenes."""
    folder = tmp_path_factory.mktemp("scanned")
    (folder / "scanner.py").write_text(READER)
    (folder / "tiny.yaml").write_text(tiny.replace("name: digits", "name: 'scanner:open_scanned'"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PERDURE_CACHE", str(folder / "cache"))
        yield folder / "tiny.yaml"


@pytest.fixture(scope="module")
def finished(cli, recipe: Path) -> Path:
    """A finished run of it."""
    done = cli("run", recipe, "--out", recipe.parent / "run", *WORDS, "evaluate.tolerance=1.5")
    assert done.code == 0, done.err
    return recipe.parent / "run"


@pytest.fixture
def scanned(finished: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_distances_go_into_cases_results_report_and_audit(scanned: Path, cli) -> None:
    table = read_cases(scanned / LAST)
    classes = [c for c in table.labels if c and len(table.of("dice", c))]
    assert classes and all(len(table.of("hd95", c)) == len(table.of("dice", c)) for c in classes)
    assert not len(table.of("hd95", 0))
    rows = {(r.figure, r.class_id): r for r in read_results(scanned / "results.csv") if r.after_task == 2}
    for name, measure in (("hd95[mm]", "hd95"), ("asd[mm]", "asd"), ("nsd[mm,1.5]", "nsd"), ("dice.cases", "dice")):
        for c in classes:
            values = table.of(measure, c)
            assert rows[name, c].value == pytest.approx(values.mean(), abs=1e-5)
            assert rows[name, c].n == len(values)
        assert rows[name, None].value == pytest.approx(
            sum(rows[name, c].value for c in classes) / len(classes), abs=1e-4
        )
    for name in ("dice.tasks", "wcd", "mpe", "drr"):
        assert (name, None) in rows, name
    page = (scanned / "report.html").read_text()
    assert all(f'href="#def-{name}"' in page for name in ("hd95", "asd", "nsd", "bwtr", "drr"))
    why = json.loads((scanned / "results.json").read_text())["not_computable"]["2"]
    assert why["rma"].startswith("needs a run of the method 'independent'")
    assert cli("audit", scanned).code == 0


def test_distances_that_cannot_be_are_found(scanned: Path) -> None:
    before = (scanned / LAST).read_text()
    line = next(text for text in before.splitlines()[1:] if text.split(",")[4])
    parts = line.split(",")
    parts[4] = "-3.0000"
    (scanned / LAST).write_text(before.replace(line, ",".join(parts)))
    problems = [f"{p}" for p in audit(scanned).problems]
    assert any("distances between surfaces that cannot be" in problem for problem in problems), problems


def test_a_changed_distance_is_told_of_both_files_and_nobody_is_advised_to_write_it_on(
    scanned: Path, rewrite: Callable[[Path], None]
) -> None:
    """The list of files was written anew too: which of the two files was changed cannot be told from inside."""
    kept = {name: (scanned / name).read_bytes() for name in ("results.csv", "results.json", "report.html")}
    rows = [line.split(",") for line in (scanned / LAST).read_text().splitlines()]
    alone = [row for row in rows[1:] if row[4] and "0" in row[7:9]]  # only one of truth and prediction is there
    for row in alone:
        if row[:2] == alone[0][:2]:  # of one case all have the same distance, the diagonal: as somebody who knows it
            row[4] = row[5] = f"{float(row[4]) + 1:.4f}"
    (scanned / LAST).write_text("\n".join(map(",".join, rows)) + "\n")
    rewrite(scanned)
    for name, content in kept.items():
        (scanned / name).write_bytes(content)
    list_files(scanned, kept)
    problems = audit(scanned).problems
    told = next(problem for problem in problems if problem.startswith("results.csv: "))
    assert "(hd95[mm]" in told and "does not agree with cases.csv of the tasks: one of them was changed" in told
    assert "restore that from a copy" in told
    assert not any("writes it again" in problem for problem in problems), problems


def test_another_tolerance_is_another_run(scanned: Path, cli, recipe: Path) -> None:
    done = cli("run", recipe, "--out", scanned, "--resume", *WORDS, "evaluate.tolerance=3")
    assert done.code == 1 and "another value of 'evaluate.tolerance'" in done.err, done.err
