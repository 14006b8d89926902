"""Sources that take turns in filling a part of every batch."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from perdure.data.sampling import Batches, BatchSampler, Mix, shares
from perdure.data.tensors import tensor_view
from perdure.labels import label_space


def samples(number: int):  # type: ignore[no-untyped-def]
    return tensor_view(torch.zeros(number, 1, 2, 2), torch.zeros(number, 2, 2, dtype=torch.int64), label_space(["a"]))


def test_no_source_means_no_share() -> None:
    assert shares([], 4) == ()


@pytest.mark.parametrize("past", range(1, 7))
@pytest.mark.parametrize("batch", [2, 3, 4, 16])
def test_every_batch_is_full_and_turns_are_even(past: int, batch: int) -> None:
    """The published rule, half of the batch // tasks, loses places: in a batch of 4 none is left for three tasks."""
    replayed = batch // 2
    sources = [samples(3 + k) for k in range(past)]
    mix = Mix((Batches(samples(40), batch - replayed), *shares(sources, replayed)))
    seen: Counter[int] = Counter()
    drawn: dict[int, list[int]] = {k: [] for k in range(past + 1)}
    for step in BatchSampler(mix, seed=1, start=0, stop=60):
        assert len(step) == batch
        assert sum(draw.part == 0 for draw in step) == batch - replayed
        seen.update(draw.part for draw in step if draw.part)
        numbers = [seen[k] for k in range(1, past + 1)]
        assert max(numbers) - min(numbers) <= 1
        for draw in step:
            drawn[draw.part].append(draw.position)
    for k, source in enumerate(sources, 1):  # endless: every pass has each sample once, whatever the others do
        size = len(source)
        whole = [drawn[k][i : i + size] for i in range(0, len(drawn[k]) - size + 1, size)]
        assert whole and all(sorted(one) == list(range(size)) for one in whole)
        assert len(whole) == 1 or len({tuple(one) for one in whole}) > 1


def test_a_run_that_goes_on_draws_the_same() -> None:
    mix = Mix((Batches(samples(10), 2), *shares([samples(3), samples(5), samples(4)], 2)))
    whole = list(BatchSampler(mix, 7, 0, 30))
    assert list(BatchSampler(mix, 7, 11, 30)) == whole[11:]
    split = [list(BatchSampler(mix, 7, 0, 30, rank, 2)) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*split, strict=True)] == [sorted(step) for step in whole]
    assert len({draw.seed for step in whole for draw in step}) == sum(map(len, whole))
