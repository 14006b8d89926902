"""Windows cover an image, and averaging them changes nothing where it should not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from perdure.inference import trained
from perdure.inference.tiling import averaged, starts
from perdure.trained import winners


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


def pointwise(window: Tensor) -> Tensor:
    """Scores that depend on each pixel alone."""
    return torch.stack([window[:, 0], window[:, 1] * 2, window.sum(1)], 1)


@pytest.mark.parametrize("shape", [(7, 9), (16, 16), (33, 17), (5, 40), (12, 11, 10)])
@pytest.mark.parametrize("overlap", [0.0, 1 / 3, 0.8])
def test_a_pointwise_scorer_sees_no_windows(shape: tuple[int, ...], overlap: float) -> None:
    image = torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(averaged(pointwise, image, 8, overlap), pointwise(image))


def test_overlapping_windows_are_averaged() -> None:
    calls: list[tuple[int, ...]] = []

    def score(window: Tensor) -> Tensor:
        calls.append(tuple(window.shape))
        return torch.full_like(window[:, :1], len(calls))

    scores = averaged(score, torch.zeros(1, 3, 4, 6), 4, overlap=0.5)
    assert calls == [(1, 3, 4, 4)] * 2
    assert scores[0, 0, 0].tolist() == [1, 1, 1.5, 1.5, 2, 2]


def test_small_image_is_one_window() -> None:
    seen: list[torch.Size] = []
    averaged(lambda w: seen.append(w.shape) or w, torch.zeros(1, 3, 5, 8), 8)
    assert seen == [(1, 3, 5, 8)]


@pytest.mark.parametrize("size", [(6, 5), (11, 17), (3, 2), (1, 9)])
@pytest.mark.parametrize("at_once", [1, 100, 1 << 20])
def test_winners_few_channels_at_a_time(size: tuple[int, int], at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained, "SCORES_AT_ONCE", at_once)
    scores = torch.rand(1, 7, 6, 5, generator=torch.Generator().manual_seed(1))
    whole = torch.nn.functional.interpolate(scores, size, mode="bilinear", align_corners=False)
    assert torch.equal(winners(scores, size), whole[0].argmax(0))


@pytest.mark.parametrize("at_once", [1, 1 << 20])
def test_first_channel_wins_a_tie(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained, "SCORES_AT_ONCE", at_once)
    assert winners(torch.full((1, 4, 2, 2), 0.5), (6, 6)).unique().tolist() == [0]
