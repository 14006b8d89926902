"""Images in memory as a data set."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from perdure.data.case import collate
from perdure.data.dataset import Dataset, Draw, Joined
from perdure.data.sampling import Batches, BatchSampler
from perdure.data.source import AbsentSplitError, Source
from perdure.data.tensors import TensorSource, tensor_view
from perdure.engine.loader import read_draws
from perdure.labels import IGNORE, TABLE_SIZE, label_space

SPACE = label_space(["a", "b", "c"], background=None)


def numbered(count: int, start: int = 0) -> torch.Tensor:
    """Images ``(count, 3, 4, 5)``; every pixel of image i is start + i."""
    return (start + torch.arange(count).float()).view(-1, 1, 1, 1).expand(-1, 3, 4, 5).clone()


def scalar(count: int = 4, start: int = 0) -> Dataset:
    """Images that have one class each."""
    return tensor_view(numbered(count, start), torch.arange(count, dtype=torch.uint8) % 3 + 1, SPACE)


def mapped(count: int = 4) -> Dataset:
    """Images with a label map: a row of each class and one to ignore."""
    labels = torch.tensor([1, 2, 3, IGNORE], dtype=torch.int16).view(1, 4, 1).expand(count, 4, 5)
    return tensor_view(numbered(count), labels.clone(), SPACE)


def test_labels_of_whole_images() -> None:
    view = scalar()
    assert isinstance(view.source, Source) and view.source.kind == "classification"
    assert not view.source.patients and view.source.space is SPACE
    assert (len(view), view.names, view.split) == (4, ("0", "1", "2", "3"), "train")
    sample = view[2]
    assert sample.name == "2" and sample.image.dtype == torch.float32 and sample.label.dtype == torch.int64
    assert torch.equal(sample.image, torch.full((3, 4, 5), 2.0))
    assert sample.label.shape == () and int(sample.label) == 3
    batch = collate(list(view))
    assert batch.images.shape == (4, 3, 4, 5) and batch.labels.tolist() == [1, 2, 3, 1]


def test_label_maps() -> None:
    view = mapped()
    assert view.source.kind == "segmentation"
    sample = view[3]
    assert sample.label.shape == (4, 5) and sample.label[:, 0].tolist() == [1, 2, 3, IGNORE]
    assert collate(list(view)).labels.shape == (4, 4, 5)


def test_volumes() -> None:
    view = tensor_view(torch.zeros(2, 1, 3, 4, 5), torch.ones(2, 3, 4, 5, dtype=torch.uint8), SPACE)
    assert view.source.kind == "segmentation"
    assert view[1].image.shape == (1, 3, 4, 5) and view[1].label.shape == (3, 4, 5)


def test_every_label_stays_as_it_is() -> None:
    labels = torch.arange(TABLE_SIZE, dtype=torch.int16)
    view = tensor_view(torch.zeros(TABLE_SIZE, 1, 1, 1), labels, SPACE)
    assert [int(sample.label) for sample in view] == list(range(TABLE_SIZE))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_images_come_in_plain_order_whatever_their_layout(layout: torch.memory_format) -> None:
    images = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    view = tensor_view(images.to(memory_format=layout), torch.ones(2, dtype=torch.uint8), SPACE)
    assert view[1].image.is_contiguous() and torch.equal(view[1].image, images[1])


def test_seed_of_a_draw_changes_nothing_and_the_generator_stays() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    view = scalar()
    assert torch.equal(view[Draw(1, 7)].image, view[Draw(1, 8)].image)
    assert torch.equal(torch.rand(1), expected)


def test_end_and_other_splits() -> None:
    view = scalar()
    assert len(list(view)) == 4
    for position in (4, 99):
        with pytest.raises(IndexError):
            view[position]
    assert len(tensor_view(torch.zeros(0, 1, 2, 2), torch.zeros(0, dtype=torch.uint8), SPACE)) == 0
    with pytest.raises(AbsentSplitError, match="no split 'val'"):
        view.source.names("val")


def test_fingerprint_follows_labels_and_shape() -> None:
    def digest(images: torch.Tensor, labels: list[int]) -> str:
        return TensorSource(images, torch.tensor(labels, dtype=torch.uint8), SPACE).fingerprint("train")

    first = digest(numbered(2), [1, 2])
    assert first == digest(numbered(2), [1, 2])
    assert len({first, digest(numbered(2), [2, 1]), digest(numbered(2)[..., :4], [1, 2])}) == 3


def test_tensors_on_a_device_come_back_to_the_cpu() -> None:
    images = torch.ones(2, 1, 2, 2, requires_grad=True) * 2
    view = tensor_view(images.detach(), torch.ones(2, dtype=torch.int64), SPACE)
    assert view[0].image.device.type == "cpu" and view[0].label.dtype == torch.int64
    assert np.asarray(view.source.mask("train", "0")).dtype == np.int16


@pytest.mark.parametrize("make", [scalar, mapped])
def test_view_travels_to_another_process(make) -> None:
    view = make()
    again = pickle.loads(pickle.dumps(view))
    assert torch.equal(again[1].image, view[1].image) and torch.equal(again[1].label, view[1].label)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_old_and_new_images_with_and_without_workers(workers: int) -> None:
    joined = Joined((scalar(3), scalar(5, 10)))
    draws = BatchSampler(Batches(joined, 4), seed=1, start=0, stop=4)
    seen = list(read_draws(draws, collate, workers=workers, pin=False))
    for batch, step in zip(seen, draws, strict=True):
        assert batch is not None
        wanted = [d.position if d.position < 3 else 7 + d.position for d in step]
        assert batch.images[:, 0, 0, 0].tolist() == wanted
        assert batch.labels.tolist() == [n % 10 % 3 + 1 for n in wanted]
        assert batch.names == tuple(str(n % 10) for n in wanted)
    assert sorted(d.position for step in list(draws)[:2] for d in step) == list(range(8))
