from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from perdure.data.case import annotation_table
from perdure.errors import DataError, PerdureError
from perdure.labels import IGNORE
from perdure.metrics.confusion import ConfusionMatrix, confusion, pooled, read_counts, write_counts
from perdure.metrics.measured import class_values


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
@pytest.mark.parametrize("dtype", [torch.int16, torch.int64])
def test_same_as_counting_one_by_one(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    known = torch.tensor([0, 4, 2, 200])
    truth = torch.tensor([0, 4, 2, 200, IGNORE, 5])[torch.randint(0, 6, shape, generator=generator)].to(dtype)
    guess = known[torch.randint(0, 4, shape, generator=generator)].to(dtype)
    matrix = confusion(truth, guess, (0, 4, 2, 200))
    slow = np.zeros((4, 5), int)
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
    first.add(confusion(truth[2:], guess[2:], first.labels))
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


REST = {"cases": 1, "annotated": None, "elsewhere": [0, 0]}


@pytest.mark.parametrize(
    "entry",
    [
        {**REST, "labels": [0, 1], "matrix": [[1, 2]]},
        {**REST, "labels": [0, 1], "matrix": [[1, 2], [3]]},
        {**REST, "labels": [0, 1], "matrix": [[1, 2], [3, -4]]},
        {**REST, "labels": [0, 1], "matrix": [[1, 2], [3, 4.5]]},
        {**REST, "labels": [1, 2], "matrix": [[1, 2], [3, 4]]},
        {**REST, "labels": [0, 0], "matrix": [[1, 2], [3, 4]]},
        {**REST, "labels": [0, 1]},
        {"labels": [0, 1], "matrix": [[1, 2], [3, 4]]},
        {**REST, "labels": [0, 1], "matrix": [[1, 2], [3, 4]], "elsewhere": [1]},
        None,
    ],
)
def test_damaged_counts_are_refused_with_the_place(tmp_path: Path, entry: object) -> None:
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({"version": 2, "sets": {"all": entry}}))
    with pytest.raises(DataError, match=r"counts\.json, test set 'all'"):
        read_counts(path)


@pytest.mark.parametrize("text", ['{"version": 1, "sets": {}}', "[]", '{"version": 2}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "counts.json").write_text(text)
    with pytest.raises(DataError, match="not a counts file of version 2"):
        read_counts(tmp_path / "counts.json")


# Cases that do not label every class ------------------------------------------------------------------------------


def tells(*ids: tuple[int, ...]) -> torch.Tensor:
    """Annotation table of one case per tuple of class ids."""
    table = annotation_table(ids)
    assert table is not None
    return table


def test_a_class_that_a_case_does_not_label_is_neither_truth_nor_error_there() -> None:
    """By hand: one case labels class 1 only; its background may be class 2."""
    truth = torch.tensor([[0, 0, 0, 1, 1, 1]])
    guess = torch.tensor([[0, 1, 2, 0, 1, 2]])
    counts = ConfusionMatrix.empty((1, 2))
    counts.update(truth, guess, tells((1,)))
    # background called 2 is dropped; class 1 called 2 is missed, but no false alarm of class 2
    assert counts.matrix.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert counts.elsewhere.tolist() == [0, 1, 0] and counts.truth.tolist() == [2, 3, 0]
    values = class_values("iou", counts)
    assert values[0].value == pytest.approx(100 / 3)  # right 1, missed 1, false alarm 1
    assert values[1].value == pytest.approx(100 / 4)  # right 1, missed 2, false alarm 1
    assert values[2].value is None


def test_each_case_of_a_batch_tells_its_own_classes() -> None:
    truth, guess = torch.tensor([[0, 1], [0, 2]]), torch.tensor([[2, 1], [1, 2]])
    counts = ConfusionMatrix.empty((1, 2))
    counts.update(truth, guess, tells((1,), (2,)))
    assert counts.matrix.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 1]] and not counts.elsewhere.any()
    everything = ConfusionMatrix.empty((1, 2))
    everything.update(truth, guess, tells((1, 2), (1, 2)))
    plain = ConfusionMatrix.empty((1, 2))
    plain.update(truth, guess)
    assert everything == plain


def test_a_label_that_its_case_says_it_does_not_tell_is_dropped() -> None:
    counts = ConfusionMatrix.empty((1, 2))
    counts.update(torch.tensor([[2, 2, 1]]), torch.tensor([[1, 2, 1]]), tells((1,)))
    assert counts.matrix.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_what_is_not_labelled_survives_the_file_and_adds_up(tmp_path: Path) -> None:
    one = ConfusionMatrix((0, 1), np.array([[3, 0], [1, 2]]), np.array([0, 5]), 4, frozenset({1}))
    two = ConfusionMatrix((0, 2), np.array([[1, 0], [0, 6]]), np.array([0, 1]), 2, frozenset({2}))
    write_counts(tmp_path / "counts.json", {"one": one, "two": two})
    read = read_counts(tmp_path / "counts.json")
    assert read == {"one": one, "two": two}
    total = pooled(read)
    assert total.cases == 6 and total.annotated == {1, 2}
    assert total.elsewhere.tolist() == [0, 5, 1] and total.truth.tolist() == [4, 8, 7]
