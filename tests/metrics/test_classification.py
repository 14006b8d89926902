"""Figures of a stream whose images have one class each, against numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perdure.errors import DataError
from perdure.labels import IGNORE
from perdure.metrics.confusion import ConfusionMatrix
from perdure.metrics.figures import evaluate, group_matrix, headline
from perdure.metrics.measured import run_results
from perdure.metrics.results import read_results, write_results
from perdure.streams.description import DescribedStream, parse_stream

GROUPS = [[3, 1], [2], [4]]
# Test images: 10 of class 3, 30 of class 1, 20 of class 2, 40 of class 4.
RIGHT = ({3: (8, 10), 1: (27, 30)}, {3: (10, 10), 1: (28, 30), 2: (10, 20)},
         {3: (2, 10), 1: (18, 30), 2: (15, 20), 4: (40, 40)})  # fmt: skip

REST = {"recurs": False, "preparation": {"kind": "as_is"}}


def content(**change: Any) -> dict[str, Any]:
    classes = [{"id": c, "name": f"c{c}", "kind": "thing", "color": [c, c, c]} for c in (1, 2, 3, 4)]
    tasks: list[dict[str, Any]] = []
    old: list[int] = []
    for index, new in enumerate(GROUPS):
        tasks.append({"index": index, "name": f"t{index}", "new": new, "old": old,
                      "annotated": sorted(new), **REST})  # fmt: skip
        old = old + new
    return {"protocol": "p", "dataset": "d", "background": None, "patients": False, "kind": "classification",
            "classes": classes, "tasks": tasks, "groups": GROUPS, **change}  # fmt: skip


@pytest.fixture
def stream() -> DescribedStream:
    return parse_stream(content())


@pytest.fixture
def counts() -> dict[int, dict[str, ConfusionMatrix]]:
    """ConfusionMatrix in which every wrong image is called the class learned last."""
    made: dict[int, dict[str, ConfusionMatrix]] = {}
    for t, right in enumerate(RIGHT):
        sums = ConfusionMatrix.empty(right)
        for k, (good, all_) in enumerate(right.values(), start=1):
            wrong = len(right) if k < len(right) else 1
            sums.matrix[k, k], sums.matrix[k, wrong] = good, all_ - good
        made[t] = {"all": sums}
    return made


@pytest.mark.parametrize(
    ("name", "after", "value", "n"),
    [
        ("accuracy.all[bg=out]", 0, 87.5, 40),
        ("accuracy.all[bg=out]", 1, 80, 60),
        ("accuracy.all[bg=out]", 2, 75, 100),
        ("accuracy.all[bg=in]", 2, 75, 100),  # there is no background to count
        ("accuracy.mean[bg=out]", 0, 85, 2),
        ("accuracy.mean[bg=out]", 2, (20 + 60 + 75 + 100) / 4, 4),
        ("accuracy.average[bg=out]", 2, (87.5 + 80 + 75) / 3, 3),
        ("balanced.average[bg=out]", 2, (85 + 730 / 9 + 63.75) / 3, 3),
        # the best of 87.5 and 95 minus 50; 50 minus 75
        ("forgetting[max-last,of=accuracy]", 2, (45 - 25) / 2, 2),
        ("forgetting[best-last,of=accuracy]", 2, (45 - 0) / 2, 2),
        ("forgetting[max-last,of=accuracy]", 1, 87.5 - 95, 1),
        ("forgetting[max-last,of=balanced]", 2, ((100 + 280 / 3) / 2 - 40 - 25) / 2, 2),
        ("bwt[last-diagonal,of=accuracy]", 2, (50 - 87.5 + 25) / 2, 2),
    ],
)
def test_figures(stream: DescribedStream, counts: Any, name: str, after: int, value: float, n: int) -> None:
    got = evaluate(name, run_results(stream, counts), after)
    assert (got.value, got.n) == (pytest.approx(value), n)


def test_headline_and_matrix(stream: DescribedStream, counts: Any) -> None:
    assert headline(stream) == [
        "accuracy.all[bg=out]",
        "accuracy.mean[bg=out,absent=skip]",
        "forgetting[max-last,of=accuracy]",
        "accuracy.average[bg=out]",
    ]
    assert group_matrix(run_results(stream, counts), "accuracy") == {
        0: [87.5, None, None],
        1: [95, 50, None],
        2: [50, 75, 100],
    }


def test_result_files_hold_what_makes_sense_for_images(stream: DescribedStream, counts: Any, tmp_path: Path) -> None:
    write_results(tmp_path, run_results(stream, counts))
    rows = read_results(tmp_path / "results.csv")
    names = {row.figure.partition("[")[0] for row in rows}
    assert names == {
        "accuracy.all",
        "accuracy.mean",
        "accuracy.average",
        "balanced.average",
        "forgetting",
        "bwt",
        "recall",
        "precision",
    }
    assert not [row.figure for row in rows if "bg=in" in row.figure or "miou" in row.figure]
    by_name = {row.figure: row.value for row in rows if row.after_task == 2 and row.class_id is None}
    assert by_name["forgetting[max-last,of=accuracy]"] == pytest.approx(10)
    assert "forgetting[max-last,of=balanced]" in by_name
    assert [r.value for r in rows if (r.after_task, r.class_id, r.figure) == (2, 2, "recall")] == [75]
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["group_accuracy"]["2"] == [50, 75, 100]
    assert "group_miou" not in document
    assert document["headline"] == headline(stream)


def test_kind_of_a_stream() -> None:
    old = content()
    del old["kind"]
    assert parse_stream(old).kind == "segmentation"
    assert parse_stream(content()).kind == "classification"
    with pytest.raises(DataError, match="kind: Input should be 'segmentation' or"):
        parse_stream(content(kind="regression"))


def test_batches_of_image_labels_are_counted() -> None:
    torch = pytest.importorskip("torch")
    counts = ConfusionMatrix.empty((3, 1))
    counts.update(torch.tensor([3, 3, 1, IGNORE]), torch.tensor([3, 1, 1, 1]))
    assert np.array_equal(counts.matrix, [[0, 0, 0], [0, 1, 1], [0, 0, 1]])
