"""Which samples make up which step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from perdure.data.case import Case, collate
from perdure.data.dataset import Dataset
from perdure.data.preparation import Preparation
from perdure.data.sampling import Batches, BatchSampler
from perdure.data.source import Source
from perdure.engine.loader import read_draws
from perdure.errors import DataError, UsageError
from perdure.labels import TABLE_SIZE, label_space


class Numbers(Source):
    """Sample i is an image of i."""

    name, kind, patients, other_label = "numbers", "segmentation", False, 0
    space = label_space(["a"])

    def __init__(self, count: int) -> None:
        self.count = count

    def names(self, split: str) -> list[str]:
        return [str(i) for i in range(self.count)]

    def image(self, split: str, name: str) -> np.ndarray:
        return np.full((1, 2, 2), int(name), np.uint8)

    def mask(self, split: str, name: str) -> np.ndarray:
        return np.zeros((2, 2), np.uint8)

    def fingerprint(self, split: str) -> str:
        return str(self.count)


class Jitter(Preparation):
    def train(self, case: Case) -> Case:
        return replace(case, image=case.image + torch.rand(()), label=case.label.long())


def view(count: int) -> Dataset:
    names, table = tuple(str(i) for i in range(count)), np.arange(TABLE_SIZE, dtype=np.int16)
    return Dataset(Numbers(count), "train", names, table, Jitter(), True)


def positions(draws: BatchSampler) -> list[list[int]]:
    return [[d.position for d in step] for step in draws]


def test_every_epoch_shows_every_sample_in_a_new_order() -> None:
    steps = positions(BatchSampler(Batches(view(8), 4), seed=3, start=0, stop=4))
    first, second = steps[0] + steps[1], steps[2] + steps[3]
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second


def test_starting_late_gives_what_starting_early_gives_there() -> None:
    batches = Batches(view(10), 4)
    whole = list(BatchSampler(batches, seed=3, start=0, stop=7))
    assert list(BatchSampler(batches, seed=3, start=3, stop=7)) == whole[3:]


def test_processes_share_the_batch_of_one() -> None:
    batches = Batches(view(8), 4)
    one = list(BatchSampler(batches, seed=1, start=0, stop=2))
    two = [list(BatchSampler(batches, seed=1, start=0, stop=2, rank=r, world=2)) for r in (0, 1)]
    assert [a + b for a, b in zip(*two, strict=True)] == one


def test_last_batch_is_dropped_or_kept_and_a_small_set_is_one_batch() -> None:
    assert Batches(view(10), 4).steps() == 2
    assert Batches(view(10), 4, drop_last=False).steps() == 3
    assert Batches(view(3), 4).steps() == 1
    assert len(positions(BatchSampler(Batches(view(3), 4), 0, 0, 1))[0]) == 3


def test_weights_draw_with_replacement() -> None:
    batches = Batches(view(4), 5, weights=torch.tensor([0.0, 1.0, 0.0, 0.0]), draws=10)
    assert batches.steps() == 2
    assert positions(BatchSampler(batches, 0, 0, 2)) == [[1] * 5] * 2


def test_the_same_draw_gives_the_same_augmentation_with_and_without_workers() -> None:
    draws = BatchSampler(Batches(view(6), 3), seed=5, start=0, stop=2)
    here = [batch.images for batch in read_draws(draws, collate, workers=0, pin=False)]
    there = [batch.images for batch in read_draws(draws, collate, workers=1, pin=False)]
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    assert not torch.equal(here[0] - here[0].floor(), here[1] - here[1].floor())


def test_reading_leaves_the_generator_outside_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    next(iter(read_draws(BatchSampler(Batches(view(6), 3), 5, 0, 1), collate, workers=0, pin=False)))
    assert torch.equal(torch.rand(2), expected)


def test_empty_set_and_uneven_share_are_plain_errors() -> None:
    with pytest.raises(DataError, match="empty"):
        read_draws(BatchSampler(Batches(view(0), 3), 0, 0, 1), collate, workers=0, pin=False)
    with pytest.raises(UsageError, match="multiple of 2"):
        read_draws(BatchSampler(Batches(view(6), 3), 0, 0, 1, rank=0, world=2), collate, workers=0, pin=False)
