from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from perdure.errors import DataError
from perdure.metrics.confusion import ConfusionMatrix
from perdure.metrics.measured import run_results
from perdure.metrics.results import COLUMNS, ResultRow, read_results, results_rows, to_csv, write_results
from perdure.streams.description import DescribedStream, parse_stream

REST = {"recurs": False, "preparation": {"kind": "as_is"}}


@pytest.fixture
def stream() -> DescribedStream:
    classes = [{"id": c, "name": n, "kind": "thing", "color": [c, 0, 0]} for c, n in ((4, 'a,"b"'), (2, "é"))]
    tasks = [{"index": 0, "name": "first", "new": [4], "old": [], "annotated": [4], **REST},
             {"index": 1, "name": "then", "new": [2], "old": [4], "annotated": [2], **REST}]  # fmt: skip
    return parse_stream({"protocol": "1-1", "dataset": "toy", "background": "ground", "patients": False,
                         "classes": classes, "tasks": tasks, "groups": [[4], [2]]})  # fmt: skip


@pytest.fixture
def counts() -> dict[int, dict[str, ConfusionMatrix]]:
    return {
        0: {"all": ConfusionMatrix((0, 4), np.array([[8, 1], [1, 2]]))},
        1: {"all": ConfusionMatrix((0, 4, 2), np.array([[8, 0, 1], [0, 3, 0], [0, 0, 0]]))},
    }


def test_rows_hold_figures_without_class_and_values_of_classes(stream, counts) -> None:
    rows = results_rows(run_results(stream, counts))
    assert ResultRow(0, "first", 4, 'a,"b"', "iou", 50.0, 3) in rows
    assert ResultRow(1, "then", 0, "ground", "recall", pytest.approx(800 / 9), 9) in rows
    by_name = {(r.after_task, r.figure): r for r in rows if r.class_id is None}
    assert by_name[1, "forgetting[max-last]"].value == pytest.approx(50 - 100)
    assert by_name[1, "miou.old[bg=out,absent=skip]"].value == pytest.approx(100)
    assert (0, "miou.old[bg=out,absent=skip]") not in by_name
    assert (1, "miou.new[absent=skip]") not in by_name, "class 2 is not in the ground truth"
    assert by_name[1, "miou.new[absent=zero]"].value == 0.0
    assert not [r for r in rows if r.after_task == 1 and r.class_id == 2 and r.figure != "precision"]
    assert all(np.isfinite(r.value) for r in rows)


def test_partly_done_runs_have_the_rows_so_far(stream, counts) -> None:
    assert results_rows(run_results(stream, {})) == []
    assert {r.after_task for r in results_rows(run_results(stream, {0: counts[0]}))} == {0}


def test_files_read_back_exactly_and_have_equal_bytes(stream, counts, tmp_path: Path) -> None:
    rows = write_results(tmp_path, run_results(stream, counts))
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(first) == {"results.csv", "results.json"}
    assert read_results(tmp_path / "results.csv") == rows
    write_results(tmp_path, run_results(stream, counts))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == first
    document = json.loads(first["results.json"])
    assert document["group_miou"] == {"0": [50.0, None], "1": [100.0, None]}
    assert document["headline"][0] == "miou.all[bg=in,absent=skip]"
    assert set(document["figures"]) == {r.figure for r in rows}
    assert document["figures"]["iou"]["better"] == "higher"
    assert len(document["rows"]) == len(rows)


HEAD = ",".join(COLUMNS[:-1])  # as runs made before the split could be chosen have it


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a table of results"),
        ("a,b\n", "not a table of results"),
        (f"{HEAD}\n0,t,,,miou.all,1.0\n", "line 2: 6 columns instead of 7"),
        (f"{HEAD}\n0,t,,,hiou[bg=in,absent=skip],x,3\n", "line 2"),
        (f'{HEAD}\n0,t,,,"miou.all[bg=in,absent=skip]",nan,3\n', "not a figure with a finite value"),
        (f'{HEAD}\n0,t,,,"miou.all[bg=in,absent=skip]",1.0,-3\n', "not a figure with a finite value"),
        (f"{HEAD}\n0,t,,,miou.all,1.0,3\n", "'miou.all' = 1.0"),
        (f"{HEAD}\n0,t,,,made.up,1.0,3\n", "unknown figure 'made.up'"),
        (f"{HEAD}\nzero,t,,,hiou,1.0,3\n", "line 2"),
    ],
)
def test_damaged_tables_are_refused_with_the_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "results.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_results(tmp_path / "results.csv")


def test_missing_table_is_a_plain_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="could not read"):
        read_results(tmp_path / "results.csv")


def test_csv_is_plain(stream, counts) -> None:
    lines = to_csv(results_rows(run_results(stream, counts))).split("\n")
    assert lines[0] == "after_task,task,class_id,class_name,figure,value,n,split"
    assert lines[-1] == ""
    assert '0,first,4,"a,""b""",iou,50.0,3,test' in lines


@pytest.mark.parametrize(
    ("old", "now"),
    [
        ("accuracy.average[bg=in,absent=skip]", "miou.average[bg=in,absent=skip]"),
        ("accuracy.average[of=accuracy,bg=out,absent=zero]", "accuracy.average[bg=out]"),
        ("accuracy.average[of=balanced,bg=out,absent=zero]", "balanced.average[bg=out,absent=zero]"),
    ],
)
def test_tables_of_earlier_runs_are_read_under_the_present_names(tmp_path: Path, old: str, now: str) -> None:
    (tmp_path / "results.csv").write_text(f'{HEAD}\n1,t,,,"{old}",50.0,2\n')
    assert read_results(tmp_path / "results.csv") == [ResultRow(1, "t", None, "", now, 50.0, 2)]
