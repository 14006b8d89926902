"""The one way from a case to labels: windows, scores in parts, the running maximum, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from perdure.data.preparation import Preparation
from perdure.inference import case as cases
from perdure.inference.case import predict_cases, starts
from perdure.methods.prediction import Prediction

AS_IS = Preparation()


def windows(side: int, overlap: float) -> Preparation:
    return Preparation(window=side, overlap=overlap)


def dense(score: Callable[[Tensor], Tensor], ids: Sequence[int]) -> Callable[[Tensor], Prediction]:
    """A model that computes all its scores at once."""
    return lambda images: Prediction.dense(score(images), ids)


def pointwise(images: Tensor) -> Tensor:
    """Scores that depend on each pixel alone."""
    return torch.stack([images[:, 0], images[:, 1] * 2, images.sum(1)], 1)


@pytest.mark.golden
@pytest.mark.parametrize(("length", "expected"), [(683, [0, 171]), (853, [0, 341]), (854, [0, 341, 342])])
def test_golden_starts(length: int, expected: list[int]) -> None:
    assert starts(length, 512, 341) == expected


@pytest.mark.parametrize("size", [1, 5, 8])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_windows_cover_the_axis_and_end_at_its_border(size: int, stride: int) -> None:
    for length in range(1, 40):
        first = starts(length, size, stride)
        assert first == sorted(set(first)) and first[0] == 0
        assert first[-1] == max(0, length - size)
        if stride <= size:
            assert {i for at in first for i in range(at, min(at + size, length))} == set(range(length))


@pytest.mark.parametrize("shape", [(7, 9), (16, 16), (33, 17), (5, 40), (12, 11, 10)])
@pytest.mark.parametrize("overlap", [0.0, 1 / 3, 0.8])
@pytest.mark.parametrize("at_once", [1, 1 << 20])
def test_a_pointwise_scorer_sees_neither_windows_nor_parts(
    shape: tuple[int, ...], overlap: float, at_once: int
) -> None:
    images = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    found = predict_cases(dense(pointwise, (0, 7, 300)), images, windows(8, overlap), shape, at_once)
    best = pointwise(images).max(1)
    assert torch.equal(found.labels, torch.tensor([0, 7, 300], dtype=torch.int16)[best.indices])
    torch.testing.assert_close(found.confidence, best.values)


def test_overlapping_windows_are_averaged() -> None:
    calls: list[tuple[int, ...]] = []

    def score(images: Tensor) -> Tensor:
        calls.append(tuple(images.shape))
        return torch.full_like(images[:, :1], len(calls))

    found = predict_cases(dense(score, (3,)), torch.zeros(1, 3, 4, 6), windows(4, 0.5), (4, 6))
    assert calls == [(1, 3, 4, 4)] * 2
    assert found.confidence[0, 0].tolist() == [1, 1, 1.5, 1.5, 2, 2]


@pytest.mark.parametrize("size", [(6, 5), (11, 17), (3, 2), (1, 9)])
@pytest.mark.parametrize("at_once", [1, 100, 1 << 20])
def test_scores_come_back_to_the_raw_grid_before_the_best_wins(size: tuple[int, int], at_once: int) -> None:
    scores = torch.rand(1, 7, 6, 5, generator=torch.Generator().manual_seed(1))
    found = predict_cases(dense(lambda _: scores, range(7)), torch.zeros(1, 3, 6, 5), AS_IS, size, at_once)
    whole = torch.nn.functional.interpolate(scores, size, mode="bilinear", align_corners=False)
    assert torch.equal(found.labels.long(), whole.argmax(1))
    torch.testing.assert_close(found.confidence, whole.amax(1))


@pytest.mark.parametrize("at_once", [1, 1 << 20])
def test_first_channel_wins_a_tie(at_once: int) -> None:
    flat = dense(lambda images: torch.full((1, 4, 2, 2), 0.5), (9, 1, 2, 3))
    assert predict_cases(flat, torch.zeros(1, 3, 2, 2), AS_IS, (6, 6), at_once).labels.unique().tolist() == [9]


def test_images_with_one_class_each() -> None:
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3]])
    found = predict_cases(dense(lambda _: scores, (5, 2, 8)), torch.zeros(2, 3, 9, 9), AS_IS, ())
    assert found.labels.tolist() == [2, 5]
    torch.testing.assert_close(found.confidence, torch.tensor([0.7, 0.5]))


class Counting:
    """A model whose predictions count how often images are encoded and which channels are scored."""

    def __init__(self, groups: tuple[int, ...], held_bytes: int) -> None:
        self.groups, self.held_bytes = groups, held_bytes
        self.encoded = 0
        self.asked: list[tuple[int, ...]] = []

    def __call__(self, images: Tensor) -> Prediction:
        self.encoded += 1

        def score(channels: Sequence[int]) -> Tensor:
            self.asked.append(tuple(channels))
            return torch.stack([images[:, 0] * (channel % 3 + 1) for channel in channels], 1)

        return Prediction(tuple(range(sum(self.groups))), score, self.groups, self.held_bytes)


def test_groups_are_not_cut_unless_one_alone_is_too_large() -> None:
    whole = Prediction(tuple(range(9)), lambda _: torch.zeros(1), groups=(2, 2, 5))
    assert whole.chunks(100) == [tuple(range(9))]
    assert whole.chunks(4) == [(0, 1, 2, 3), (4, 5, 6, 7), (8,)]
    assert whole.chunks(3) == [(0, 1), (2, 3), (4, 5, 6), (7, 8)]
    assert [len(run) for run in whole.chunks(1)] == [1] * 9


@pytest.mark.parametrize(("held_bytes", "encoded"), [(1, 4), (1 << 40, 12)])
def test_windows_are_encoded_once_where_their_features_fit(held_bytes: int, encoded: int) -> None:
    model = Counting((2, 2, 2), held_bytes)
    images = torch.rand(1, 3, 6, 6)
    found = predict_cases(model, images, windows(4, 0.5), (6, 6), scores_at_once=2 * 36)
    assert model.encoded == encoded, "four windows, three groups"
    assert model.asked == [channels for channels in ((0, 1), (2, 3), (4, 5)) for _ in range(4)]
    assert found.labels.unique().tolist() == [2]


def test_all_scores_in_one_part_encode_each_window_once() -> None:
    model = Counting((2, 2, 2), 1 << 40)
    predict_cases(model, torch.rand(1, 3, 6, 6), windows(4, 0.5), (6, 6))
    assert model.encoded == 4


def test_scores_in_memory_do_not_grow_with_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    largest: list[int] = []
    average = cases._average

    def watched(*args: object) -> Tensor:
        scores = average(*args)  # type: ignore[arg-type]
        largest.append(scores.numel())
        return scores

    monkeypatch.setattr(cases, "_average", watched)
    for classes in (2, 20, 143):
        largest.clear()
        predict_cases(Counting((1,) * classes, 1), torch.rand(1, 3, 32, 32), windows(16, 0.5), (32, 32), 4 * 32 * 32)
        assert max(largest) == min(classes, 4) * 32 * 32
