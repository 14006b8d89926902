"""Views, views one after another, and batches; what is read before workers start."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from perdure.data.case import Batch, Case, collate
from perdure.data.dataset import Dataset, Draw, Joined
from perdure.data.preparation import Preparation
from perdure.data.sampling import Batches, BatchSampler
from perdure.data.source import Source
from perdure.engine.loader import read_draws
from perdure.errors import DataError, SealedDataError
from perdure.labels import IGNORE, TABLE_SIZE, label_space, remap_table

LIMIT = 2**15


@dataclass
class Numbers(Source):
    """Sample i is an image of ``first + i``; ``loaded``: the process that read first, as of an archive."""

    first: int
    count: int
    scalar: bool = False
    spoilt: bool = False
    loaded: list[int] = field(default_factory=list)
    name = "numbers"
    patients = False
    other_label = 0
    space = label_space(["a", "b"])

    @property
    def kind(self) -> str:
        return "classification" if self.scalar else "segmentation"

    def names(self, split: str) -> list[str]:
        return [f"n{self.first + i}" for i in range(self.count)]

    def image(self, split: str, name: str) -> np.ndarray:
        if not self.loaded:
            self.loaded.append(os.getpid() % LIMIT)
        if self.spoilt:
            raise DataError(f"{name} is damaged")
        return np.asarray([int(name[1:]), self.loaded[0]], np.float32).reshape(2, 1, 1).repeat(2, 1).repeat(3, 2)

    def mask(self, split: str, name: str) -> np.ndarray:
        number = 1 + int(name[1:]) % 2
        return np.asarray(number, np.uint8) if self.scalar else np.full((2, 3), number, np.uint8)

    def fingerprint(self, split: str) -> str:
        return f"{self.first} {self.count}"


AS_IS = Preparation()


class Jitter(Preparation):
    def train(self, case: Case) -> Case:
        return replace(case, image=case.image + torch.rand(()), label=case.label.long())


def view(first: int, count: int, preparation=AS_IS, table=None, check=None, **more) -> Dataset:
    source = Numbers(first, count, **more)
    table = np.arange(TABLE_SIZE, dtype=np.int16) if table is None else table
    return Dataset(source, "train", tuple(source.names("train")), table, preparation, True, check)


def value(sample: Case) -> int:
    return int(sample.image[0, 0, 0])


@pytest.mark.parametrize("scalar", [True, False])
def test_a_sample(scalar: bool) -> None:
    sample = view(4, 3, scalar=scalar, table=remap_table([2], 0))[1]
    assert (value(sample), sample.name) == (5, "n5")
    assert sample.label.dtype == torch.int64 and sample.label.shape == (() if scalar else (2, 3))
    assert sample.label.unique().tolist() == [2]
    other = view(4, 3, scalar=scalar, table=remap_table([2], 0))[0]
    assert other.label.unique().tolist() == [0]


def test_draw_says_position_and_seed() -> None:
    shown = view(0, 3, Jitter())
    same, again, differs = shown[Draw(1, 5)], shown[Draw(1, 5)], shown[Draw(1, 6)]
    assert torch.equal(same.image, again.image) and not torch.equal(same.image, differs.image)
    assert torch.equal(shown[1].image, shown[Draw(1, 0)].image)


def test_map_of_another_size_is_told() -> None:
    class Wrong(Numbers):
        def mask(self, split: str, name: str) -> np.ndarray:
            return np.zeros((3, 2), np.uint8)

    wrong = Dataset(Wrong(0, 1), "train", ("n0",), np.arange(TABLE_SIZE, dtype=np.int16), AS_IS, True)
    with pytest.raises(DataError, match=r"image and mask of 'n0' differ in size \(width×height\): image 3×2, mask 2×3"):
        wrong[0]


@pytest.mark.parametrize("scalar", [True, False])
def test_joined_views_are_one_set(scalar: bool) -> None:
    joined = Joined((view(0, 2, scalar=scalar), view(10, 0, scalar=scalar), view(20, 3, scalar=scalar)))
    assert len(joined) == 5
    assert [value(joined[i]) for i in range(5)] == [0, 1, 20, 21, 22]
    assert [value(sample) for sample in joined] == [0, 1, 20, 21, 22]  # ends by itself
    assert [value(joined[-i]) for i in range(1, 6)] == [22, 21, 20, 1, 0]
    for position in (5, 6, 99, -6):
        with pytest.raises(IndexError, match=f"position {position} of 5 samples"):
            joined[position]
        with pytest.raises(IndexError):
            joined[Draw(position, 3)]
    assert len(Joined(())) == 0 and list(Joined(())) == []
    batch = collate(list(joined))
    assert batch.labels.shape == ((5,) if scalar else (5, 2, 3)) and batch.names == ("n0", "n1", "n20", "n21", "n22")


def test_seed_of_a_draw_goes_along() -> None:
    first, second = view(0, 2, Jitter()), view(20, 3, Jitter())
    joined = Joined((first, second))
    for seed in (1, 2):
        assert torch.equal(joined[Draw(1, seed)].image, first[Draw(1, seed)].image)
        assert torch.equal(joined[Draw(3, seed)].image, second[Draw(1, seed)].image)
    assert not torch.equal(joined[Draw(3, 1)].image, joined[Draw(3, 2)].image)


def test_each_view_keeps_its_own_table_and_gate() -> None:
    def closed() -> None:
        raise SealedDataError("closed")

    joined = Joined((view(0, 2, table=remap_table([1], 0)), view(0, 2, table=remap_table([2], IGNORE), check=closed)))
    assert [int(joined[i].label[0, 0]) for i in range(2)] == [1, 0]
    with pytest.raises(SealedDataError, match="closed"):
        joined[2]


def test_joined_views_travel_to_another_process() -> None:
    joined = Joined((view(0, 2, Jitter()), view(20, 3, Jitter())))
    again = pickle.loads(pickle.dumps(joined))
    assert len(again) == 5
    assert torch.equal(again[Draw(4, 9)].image, joined[Draw(4, 9)].image)


def test_batch_moves_and_gives_its_parts() -> None:
    batch = collate([*view(0, 2), *view(20, 3)], [0, 0, 1, 1, 1])
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, Batch) and moved.images.is_meta and moved.labels.is_meta and moved.parts.is_meta
    assert moved.annotated is None and moved.names == batch.names
    second = batch.of(1)
    assert second.names == ("n20", "n21", "n22") and len(second.images) == 3
    assert torch.equal(batch.of(0).images, batch.images[:2])


def test_annotated_classes_go_through_the_label_table_and_into_the_batch() -> None:
    class Some(Numbers):
        def read(self, split: str, name: str) -> Case:
            return replace(super().read(split, name), annotated=frozenset({1, 2}))

    table = np.arange(TABLE_SIZE, dtype=np.int16)
    table[1] = 7
    source = Some(0, 2)
    whole = Dataset(source, "train", ("n0", "n1"), table, AS_IS, True)
    assert whole[0].annotated == {7, 2}
    narrowed = replace(whole, annotated=frozenset({7, 3}))
    assert narrowed[0].annotated == {7}
    batch = collate([whole[0], narrowed[0], replace(whole[1], annotated=None)])
    assert batch.annotated is not None and batch.annotated.shape == (3, TABLE_SIZE)
    assert batch.annotated[0].nonzero().flatten().tolist() == [0, 2, 7, IGNORE]
    assert batch.annotated[1].nonzero().flatten().tolist() == [0, 7, IGNORE]
    assert batch.annotated[2].all()
    assert collate([view(0, 1)[0]]).annotated is None


def readers(samples: Dataset | Joined, workers: int) -> set[int]:
    """Which processes read the sources of all samples first."""
    draws = BatchSampler(Batches(samples, 2, drop_last=False), 0, 0, -(-len(samples) // 2))
    return {
        int(n) for batch in read_draws(draws, collate, workers, False) if batch for n in batch.images[:, 1].unique()
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_sources_are_loaded_before_workers_start(workers: int) -> None:
    here = {os.getpid() % LIMIT}
    assert readers(view(0, 6), workers) == here
    assert readers(Joined((view(0, 4), view(9, 0), view(20, 4))), workers) == here


def test_nothing_is_read_ahead_without_workers() -> None:
    whole = view(0, 4)
    read_draws(BatchSampler(Batches(whole, 2), 0, 0, 2), collate, workers=0, pin=False)
    assert not whole.source.loaded  # type: ignore[attr-defined]
    reads = read_draws(BatchSampler(Batches(whole, 2), 0, 0, 2), collate, workers=1, pin=False)
    assert whole.source.loaded == [os.getpid() % LIMIT]  # type: ignore[attr-defined]
    assert len(list(reads)) == 2


def test_first_sample_that_is_never_drawn_may_be_damaged() -> None:
    class First(Numbers):
        def image(self, split: str, name: str) -> np.ndarray:
            if name == "n0":
                raise DataError("n0 is damaged")
            return super().image(split, name)

    source = First(0, 3)
    samples = Dataset(source, "train", tuple(source.names("train")), np.arange(TABLE_SIZE, dtype=np.int16), AS_IS, True)
    never = Batches(samples, 2, weights=torch.tensor([0.0, 1.0, 1.0]), draws=4)
    assert len(list(read_draws(BatchSampler(never, 0, 0, 2), collate, workers=1, pin=False))) == 2
    with pytest.raises(DataError, match="n0 is damaged"):
        list(read_draws(BatchSampler(Batches(samples, 3), 0, 0, 1), collate, workers=1, pin=False))


def test_what_a_worker_finds_wrong_is_told_as_it_is() -> None:
    with pytest.raises(DataError, match="is damaged"):
        list(read_draws(BatchSampler(Batches(view(0, 4, spoilt=True), 2), 0, 0, 2), collate, workers=1, pin=False))
