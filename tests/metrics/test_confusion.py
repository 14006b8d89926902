from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from perdure.errors import DataError, PerdureError
from perdure.labels import IGNORE
from perdure.metrics.confusion import ConfusionMatrix, confusion, pooled, read_counts, write_counts


def test_rows_are_ground_truth_and_columns_are_predictions() -> None:
    counts = ConfusionMatrix.empty((7, 3))
    counts.update(torch.tensor([[0, 7, 7, 3]]), torch.tensor([[7, 7, 0, 3]]))
    assert counts.labels == (0, 7, 3)
    assert counts.matrix.tolist() == [[0, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_ignore_and_labels_that_are_not_listed_are_dropped() -> None:
    counts = ConfusionMatrix.empty((1,))
    counts.update(torch.tensor([IGNORE, 9, -1, 300, 1, 0]), torch.tensor([1, 1, 1, 1, 1, 1]))
    assert counts.matrix.tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("shape", [(5,), (2, 9, 7), (2, 3, 4, 5)], ids=["classification", "2d", "3d"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_same_as_counting_one_by_one(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    known = torch.tensor([0, 4, 2, 200])
    truth = torch.tensor([0, 4, 2, 200, IGNORE, 5])[torch.randint(0, 6, shape, generator=generator)].to(dtype)
    guess = known[torch.randint(0, 4, shape, generator=generator)].to(dtype)
    matrix = confusion(truth, guess, (0, 4, 2, 200))
    slow = np.zeros((4, 4), int)
    order = {0: 0, 4: 1, 2: 2, 200: 3}
    for t, g in zip(truth.flatten().tolist(), guess.flatten().tolist(), strict=True):
        if t in order:
            slow[order[t], order[g]] += 1
    assert matrix.dtype == torch.int64
    assert matrix.tolist() == slow.tolist()


@pytest.mark.parametrize("stray", [2, IGNORE, -1, 256])
def test_prediction_outside_the_list_is_an_error_even_on_ignored_pixels(stray: int) -> None:
    with pytest.raises(PerdureError, match=f"predicted label {stray},"):
        ConfusionMatrix.empty((1,)).update(torch.tensor([IGNORE]), torch.tensor([stray]))


def test_shapes_must_agree() -> None:
    with pytest.raises(PerdureError, match=r"ground truth is \(2,\) but the prediction is \(3,\)"):
        confusion(torch.zeros(2, dtype=torch.long), torch.zeros(3, dtype=torch.long), (0,))


def test_parts_add_up_in_any_order_and_as_plain_tensors() -> None:
    truth, guess = torch.tensor([0, 1, 1, 2, 0, 2]), torch.tensor([0, 1, 2, 2, 1, 0])
    whole, first, second = (ConfusionMatrix.empty((1, 2)) for _ in range(3))
    whole.update(truth, guess)
    first.update(truth[:2], guess[:2])
    second.update(truth[2:], guess[2:])
    assert (first + second) == whole == (second + first)
    first.add(second.tensor())
    assert first == whole
    copied = whole.tensor()
    copied += 1
    assert first == whole


def test_sum_of_sets_with_different_labels() -> None:
    a, b = ConfusionMatrix.empty((1,)), ConfusionMatrix.empty((2,))
    a.update(torch.tensor([0, 1]), torch.tensor([0, 1]))
    b.update(torch.tensor([0, 2, 2]), torch.tensor([2, 2, 0]))
    total = pooled({"a": a, "b": b})
    assert total.labels == (0, 1, 2)
    assert total.matrix.tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    with pytest.raises(DataError, match="no test set"):
        pooled({})


@pytest.mark.parametrize("ids", [(1, 1), (0,), (IGNORE,), (-1,)])
def test_labels_that_cannot_be_counted(ids: tuple[int, ...]) -> None:
    with pytest.raises(PerdureError, match="cannot be counted"):
        ConfusionMatrix.empty(ids)


def test_file_keeps_everything_and_its_bytes(tmp_path: Path) -> None:
    sets = {"alt — é": ConfusionMatrix((0, 5), np.array([[10**12, 1], [2, 3]])), "b": ConfusionMatrix.empty((1, 2))}
    write_counts(tmp_path / "counts.json", sets)
    first = (tmp_path / "counts.json").read_bytes()
    assert read_counts(tmp_path / "counts.json") == sets
    write_counts(tmp_path / "counts.json", read_counts(tmp_path / "counts.json"))
    assert (tmp_path / "counts.json").read_bytes() == first
    assert ConfusionMatrix.from_json(sets["b"].to_json()) == sets["b"]


@pytest.mark.parametrize(
    "entry",
    [
        {"labels": [0, 1], "matrix": [[1, 2]]},
        {"labels": [0, 1], "matrix": [[1, 2], [3]]},
        {"labels": [0, 1], "matrix": [[1, 2], [3, -4]]},
        {"labels": [0, 1], "matrix": [[1, 2], [3, 4.5]]},
        {"labels": [1, 2], "matrix": [[1, 2], [3, 4]]},
        {"labels": [0, 0], "matrix": [[1, 2], [3, 4]]},
        {"labels": [0, 1]},
        None,
    ],
)
def test_damaged_counts_are_refused_with_the_place(tmp_path: Path, entry: object) -> None:
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({"version": 1, "sets": {"all": entry}}))
    with pytest.raises(DataError, match=r"counts\.json, test set 'all'"):
        read_counts(path)


@pytest.mark.parametrize("text", ['{"version": 2, "sets": {}}', "[]", '{"version": 1}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "counts.json").write_text(text)
    with pytest.raises(DataError, match="not a counts file of version 1"):
        read_counts(tmp_path / "counts.json")
