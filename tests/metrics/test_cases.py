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
from perdure.metrics.cases import (
    COLUMNS,
    RESAMPLES,
    SEED,
    CaseCounts,
    Spread,
    problem_of,
    read_cases,
    spread,
    statistics_of,
    write_cases,
)
from perdure.metrics.confusion import ConfusionMatrix
from perdure.metrics.evaluate import count

HEAD = ",".join(COLUMNS)
EARLIER = "set,case,class_id,dice,truth,predicted,both"  # as runs made before surfaces were measured have it
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
        "test,0,0,0.0000,,,,0,1,0",
        "test,0,1,100.0000,,,,2,2,2",
        "test,0,2,66.6667,,,,2,1,1",
        "test,1,0,66.6667,,,,3,3,2",
        "test,1,1,0.0000,,,,1,0,0",
        "test,1,3,0.0000,,,,0,1,0",  # predicted and not there
        "test,2,0,100.0000,,,,2,2,2",  # what is ignored counts nowhere: classes 1 and 2 are in neither
    ]
    found = read_cases(tmp_path / "cases.csv")
    assert found.sets == ("test",) * 3
    assert {c: found.of("dice", c).tolist() for c in (1, 2, 3)} == {1: [100, 0], 2: [pytest.approx(200 / 3)], 3: [0]}
    assert not len(found.of("hd95", 1)) and not len(found.of("dice", 9))
    assert "patient" not in (tmp_path / "cases.csv").read_text()


def test_a_class_that_a_set_does_not_label_has_no_dice_there(tmp_path: Path) -> None:
    write_cases(tmp_path / "cases.csv", {"test": counted(frozenset({1, 2}))})
    found = read_cases(tmp_path / "cases.csv")
    assert 3 not in found.labels  # predicted on background: it may be there
    assert found.of("dice", 1).tolist() == [100, 0]


def test_spread() -> None:
    assert spread([10, 20, 30, 100]) == Spread(4, 40, pytest.approx(40.8248, abs=1e-4), 10, (17.5, 25, 47.5))
    assert spread([70]) == Spread(1, 70, None, 70, (70, 70, 70))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a table of cases"),
        ("a,b\n", "not a table of cases"),
        (f"{HEAD}\ntest,0,1\n", "line 2"),
        (f"{HEAD}\ntest,0,x,0,,,,1,1,1\n", "line 2"),
        (f"{HEAD}\ntest,0,1,0,1,1,1\n", "line 2: 7 columns instead of 10"),
        (f"{EARLIER}\ntest,0,1,0,,,,1,1,1\n", "line 2: 10 columns instead of 7"),
        (f"{HEAD}\ntest,0,1,0,,,,1,1,2\n", "line 2: more pixels in both"),
        (f"{HEAD}\ntest,0,1,0,,,,0,0,0\n", "line 2: more pixels in both than in one of them, or in none"),
        (f"{HEAD}\ntest,0,1,0,-1,1,50,3,2,1\n", "line 2: distances between surfaces that cannot be"),
        (f"{HEAD}\ntest,0,1,0,1,1,100.1,3,2,1\n", "line 2: distances between surfaces that cannot be"),
        (f"{HEAD}\ntest,0,1,0,1,inf,100,3,2,1\n", "line 2: distances between surfaces that cannot be"),
        (f"{HEAD}\ntest,0,1,0,1,,100,3,2,1\n", "line 2: distances between surfaces that cannot be"),
        (f"{HEAD}\ntest,0,1,0,9,9,1,3,0,0\n", "line 2: a distance between surfaces of which one does not exist"),
        (f"{HEAD}\ntest,0,1,0,9,8,0,0,3,0\n", "line 2: a distance between surfaces of which one does not exist"),
        (f"{HEAD}\ntest,0,1,0,1,0,100,3,3,3\n", "line 2: a distance between surfaces that are the same"),
    ],
)
def test_damaged_tables_are_plain_errors(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "cases.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_cases(tmp_path / "cases.csv")


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("", "", None),
        ("test,0,1,100.0000,,,,2,2,2", "test,0,1,100.0000,,,,02,2,2", "is not as it was written"),
        ("test,0,1,100.0000,,,,2,2,2", "test,0,1,99.0000,,,,2,2,2", "is not as it was written"),
        ("test,0,1,100.0000,,,,2,2,2\n", "", "its pixels do not add up to those of counts.json"),
        (
            "test,0,1,100.0000,,,,2,2,2",
            "test,0,1,100.0000,,,,4,4,4",
            "its pixels do not add up to those of counts.json",
        ),
        ("test,2,0", "test,3,0", "holds case 3 of set 'test' and class 0, which was not counted"),
        (
            "test,0,0,0.0000,,,,",
            "test,0,0,0.0000,5.0000,5.0000,0.0000,",
            "holds distances between surfaces of label 0, which are not measured",
        ),
        (
            "test,0,1,100.0000,,,,",
            "test,0,1,100.0000,0.0000,0.0000,100.0000,",
            "holds distances between surfaces of some of the classes of case 0 only",
        ),
        ("66.6667,,,,2,1", "66.6667,1.00000,1.0000,50.0000,2,1", "is not as it was written"),
        ("test,2,0", "Jane Doe,2,0", "holds case 2 of set 'Jane Doe' and class 0, which was not counted"),
    ],
)
def test_a_table_holds_nothing_besides_the_counts(old: str, new: str, problem: str | None, tmp_path: Path) -> None:
    path = tmp_path / "cases.csv"
    matrix, cases = counted_twice()
    write_cases(path, {"test": cases})
    path.write_text(path.read_text().replace(old, new) if old else path.read_text())
    assert problem_of(path, {"test": matrix}) == problem


def test_a_table_of_an_earlier_run_is_read_and_audited(tmp_path: Path) -> None:
    path, (matrix, cases) = tmp_path / "cases.csv", counted_twice()
    write_cases(path, {"test": cases})
    path.write_text(path.read_text().replace(",,,,", ",").replace("hd95,asd,nsd,", ""))
    assert path.read_text().startswith(f"{EARLIER}\ntest,0,0,0.0000,0,1,0\n")
    assert read_cases(path).of("dice", 1).tolist() == [100, 0]
    assert problem_of(path, {"test": matrix}) is None


def test_two_diagonals_of_one_image_are_a_problem(tmp_path: Path) -> None:
    path, (matrix, cases) = tmp_path / "cases.csv", counted_twice()
    surfaces = np.full(cases.pixels.shape, np.nan)
    surfaces[1, (1, 3)] = [[9, 9, 0], [9, 9, 0]]  # class 1 is missed there, class 3 is only predicted
    write_cases(path, {"test": CaseCounts(cases.labels, cases.pixels, surfaces)})
    assert problem_of(path, {"test": matrix}) is None
    assert read_cases(path).of("hd95", 3).tolist() == [9]
    surfaces[1, 3, :2] = 8
    write_cases(path, {"test": CaseCounts(cases.labels, cases.pixels, surfaces)})
    assert problem_of(path, {"test": matrix}) == "holds two different diagonals of case 1"


def test_statistics_against_a_loop_over_resamples() -> None:
    """Mean, deviation and bootstrap, each worked out one case and one resample at a time."""
    rng = np.random.default_rng(0)
    values = rng.uniform(0, 100, (12, 4))
    values[rng.random(values.shape) < 0.3] = np.nan
    values[:, 2] = np.nan  # a class that no case shows
    values[1:, 3] = np.nan  # one that a single case shows
    values[0, 3] = 40
    of_model = np.array([False, True, True, True])
    found = statistics_of(values, of_model)
    drawn = np.random.default_rng(SEED).integers(0, 12, (RESAMPLES, 12))
    means: list[list[float]] = [[], [], [], [], []]
    for cases in drawn:
        of_class = [[v for v in values[cases, k] if not np.isnan(v)] for k in range(4)]
        for k in range(4):
            means[k] += [sum(of_class[k]) / len(of_class[k])] if of_class[k] else []
        shown = [sum(v) / len(v) for v, counts in zip(of_class, of_model, strict=True) if counts and v]
        means[4] += [sum(shown) / len(shown)] if shown else []
    for k in range(4):
        own = [v for v in values[:, k] if not np.isnan(v)]
        assert found.n[k] == len(own)
        for got, wanted in (
            (found.mean[k], np.mean(own) if own else np.nan),
            (found.sd[k], np.std(own, ddof=1) if len(own) > 1 else np.nan),
            (found.low[k], np.percentile(means[k], 2.5) if len(own) > 1 else np.nan),
            (found.high[k], np.percentile(means[k], 97.5) if len(own) > 1 else np.nan),
        ):
            assert got == pytest.approx(wanted, abs=1e-6, nan_ok=True)
    assert found.mean[4] == pytest.approx((found.mean[1] + 40) / 2, abs=1e-6)
    per_case = [np.nanmean(row) for row in values[:, of_model] if not np.isnan(row).all()]
    assert (found.n[4], found.sd[4]) == (len(per_case), pytest.approx(np.std(per_case, ddof=1), abs=1e-6))
    assert found.low[4] == pytest.approx(np.percentile(means[4], 2.5), abs=1e-6)
    assert found.high[4] == pytest.approx(np.percentile(means[4], 97.5), abs=1e-6)
    again = statistics_of(values, of_model)
    assert all((one == other).all() or np.isnan(one).any() for one, other in zip(found, again, strict=True))
