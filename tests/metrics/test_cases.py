"""Dice of single cases: what is recorded, which cases count, and what a page makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from perdure.data.dataset import Dataset
from perdure.data.preparation import Preparation
from perdure.data.source import Source
from perdure.engine.machine import Machine
from perdure.engine.options import EngineOptions
from perdure.errors import DataError
from perdure.labels import IGNORE, TABLE_SIZE, label_space
from perdure.methods.prediction import Prediction
from perdure.metrics.cases import COLUMNS, CaseCounts, Spread, problem_of, read_dice, spread, write_cases
from perdure.metrics.confusion import ConfusionMatrix
from perdure.metrics.evaluate import count

HEAD = ",".join(COLUMNS)
ROWS = {
    "north/patient": ([1, 1, 2, 2], [1, 1, 2, 0]),
    "south": ([1, 0, 0, 0], [0, 0, 3, 0]),
    "east": ([0, 0, IGNORE, IGNORE], [0, 0, 1, 2]),
}


class Rows(Source):
    """Images whose pixels say what the model is to predict; a row of pixels each."""

    name, kind, patients, other_label = "rows", "segmentation", True, 0
    space = label_space(["cat", "dog", "elk"])

    def names(self, split: str) -> list[str]:
        return list(ROWS)

    def image(self, split: str, name: str) -> np.ndarray:
        return np.full((3, 1, 4), ROWS[name][1], np.float32)

    def mask(self, split: str, name: str) -> np.ndarray:
        return np.array([ROWS[name][0]], np.int16)

    def fingerprint(self, split: str) -> str:
        return "rows"


def as_the_image_says(images: Tensor) -> Prediction:
    return Prediction.dense(torch.stack([(images[:, 0] == c).float() for c in range(4)], 1), (0, 1, 2, 3))


def counted(annotated: frozenset[int] | None = None) -> CaseCounts:
    return counted_twice(annotated)[1]


def counted_twice(annotated: frozenset[int] | None = None) -> tuple[ConfusionMatrix, CaseCounts]:
    table = np.arange(TABLE_SIZE, dtype=np.int16)
    dataset = Dataset(Rows(), "test", tuple(ROWS), table, Preparation(), annotated=annotated)
    machine = Machine(EngineOptions(device="cpu", trackers=()))
    matrix, cases = count(as_the_image_says, dataset, (1, 2, 3), machine, 2, 0)
    assert cases is not None and cases.pixels.shape == (3, 4, 3)
    # summed over the cases they are the pooled counts
    assert (cases.pixels[..., 0].sum(0) == matrix.truth).all()
    assert (cases.pixels[..., 1].sum(0) == matrix.matrix.sum(0)).all()
    assert (cases.pixels[..., 2].sum(0) == matrix.matrix.diagonal()).all()
    return matrix, cases


def test_each_class_has_a_dice_in_each_case_that_shows_it(tmp_path: Path) -> None:
    write_cases(tmp_path / "cases.csv", {"test": counted()})
    assert (tmp_path / "cases.csv").read_text().splitlines() == [
        HEAD,
        "test,0,0,0.0000,0,1,0",
        "test,0,1,100.0000,2,2,2",
        "test,0,2,66.6667,2,1,1",
        "test,1,0,66.6667,3,3,2",
        "test,1,1,0.0000,1,0,0",
        "test,1,3,0.0000,0,1,0",  # predicted and not there
        "test,2,0,100.0000,2,2,2",  # what is ignored counts nowhere: classes 1 and 2 are in neither
    ]
    found = read_dice(tmp_path / "cases.csv")
    assert {c: found[c] for c in (1, 2, 3)} == {1: [100, 0], 2: [pytest.approx(200 / 3)], 3: [0]}
    assert "patient" not in (tmp_path / "cases.csv").read_text()


def test_a_class_that_a_set_does_not_label_has_no_dice_there(tmp_path: Path) -> None:
    write_cases(tmp_path / "cases.csv", {"test": counted(frozenset({1, 2}))})
    found = read_dice(tmp_path / "cases.csv")
    assert 3 not in found  # predicted on background: it may be there
    assert found[1] == [100, 0]


def test_spread() -> None:
    assert spread([10, 20, 30, 100]) == Spread(4, 40, pytest.approx(40.8248, abs=1e-4), 10, (17.5, 25, 47.5))
    assert spread([70]) == Spread(1, 70, None, 70, (70, 70, 70))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a table of cases"),
        ("a,b\n", "not a table of cases"),
        (f"{HEAD}\ntest,0,1\n", "line 2"),
        (f"{HEAD}\ntest,0,x,0,1,1,1\n", "line 2"),
        (f"{HEAD}\ntest,0,1,0,1,1,2\n", "line 2: more pixels in both"),
        (f"{HEAD}\ntest,0,1,0,0,0,0\n", "line 2: more pixels in both than in one of them, or in none"),
    ],
)
def test_damaged_tables_are_plain_errors(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "cases.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_dice(tmp_path / "cases.csv")


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("", "", None),
        ("test,0,1,100.0000,2,2,2", "test,0,1,100.0000,02,2,2", "is not as it was written"),
        ("test,0,1,100.0000,2,2,2", "test,0,1,99.0000,2,2,2", "is not as it was written"),
        ("test,0,1,100.0000,2,2,2\n", "", "its pixels do not add up to those of counts.json"),
        ("test,0,1,100.0000,2,2,2", "test,0,1,100.0000,4,4,4", "its pixels do not add up to those of counts.json"),
        ("test,2,0", "test,3,0", "holds case 3 of set 'test' and class 0, which was not counted"),
        ("test,2,0", "Jane Doe,2,0", "holds case 2 of set 'Jane Doe' and class 0, which was not counted"),
    ],
)
def test_a_table_holds_nothing_besides_the_counts(old: str, new: str, problem: str | None, tmp_path: Path) -> None:
    path = tmp_path / "cases.csv"
    matrix, cases = counted_twice()
    write_cases(path, {"test": cases})
    path.write_text(path.read_text().replace(old, new) if old else path.read_text())
    assert problem_of(path, {"test": matrix}) == problem
