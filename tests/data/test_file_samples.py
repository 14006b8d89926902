"""Samples in files as a data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from perdure.data.case import Case, collate
from perdure.data.dataset import Draw
from perdure.data.preparation import Preparation
from perdure.data.sampling import Batches, BatchSampler, Mix
from perdure.data.tensors import FileSamples, tensor_view
from perdure.engine.loader import read_draws
from perdure.errors import DataError
from perdure.files import write_tensors
from perdure.labels import label_space

SPACE = label_space(["a"])


def numbered(count: int, start: int = 0) -> torch.Tensor:
    """Images ``(count, 3, 4, 5)``; every pixel of image i is start + i."""
    return (start + torch.arange(count).float()).view(-1, 1, 1, 1).expand(-1, 3, 4, 5).contiguous()


def stored(folder: Path) -> FileSamples:
    """Two files of one sample each, then a shard of three; every pixel of image i is i, its label row i + 1."""
    images, labels = numbered(5), torch.arange(1, 6, dtype=torch.int16).view(5, 1, 1).expand(5, 4, 5).contiguous()
    for i in range(2):
        write_tensors(folder / f"{i}.safetensors", {"image": images[i], "label": labels[i], "more": torch.zeros(1)})
    write_tensors(folder / "rest.safetensors", {"images": images[2:], "labels": labels[2:]})
    return FileSamples([folder / f"{name}.safetensors" for name in ("0", "1", "rest")], annotated=frozenset({1, 2}))


def test_samples_in_files(tmp_path: Path) -> None:
    samples = stored(tmp_path)
    assert len(samples) == 5
    assert [samples[i].name for i in range(5)] == ["0", "1", "rest:0", "rest:1", "rest:2"]
    for i in (0, 1, 2, 4, -1):
        case = samples[i]
        assert torch.equal(case.image, numbered(1, i % 5)[0]) and case.image.dtype == torch.float32
        assert (
            case.label.shape == (4, 5)
            and case.label.dtype == torch.int64
            and case.label.unique().tolist() == [i % 5 + 1]
        )
        assert case.annotated == {1, 2}
    for position in (5, -6):
        with pytest.raises(IndexError):
            samples[position]
    assert len(FileSamples([])) == 0


def test_labels_of_whole_images_in_files(tmp_path: Path) -> None:
    write_tensors(tmp_path / "one", {"image": torch.zeros(1, 2, 2), "label": torch.tensor(7)})
    write_tensors(tmp_path / "many", {"images": torch.ones(2, 1, 2, 2), "labels": torch.tensor([8, 9]).short()})
    batch = collate(list(FileSamples([tmp_path / "one", tmp_path / "many"])))
    assert batch.labels.tolist() == [7, 8, 9] and batch.labels.dtype == torch.int64
    assert batch.images.shape == (3, 1, 2, 2)


def test_files_are_prepared_as_the_draw_says(tmp_path: Path) -> None:
    class Shaken(Preparation):
        def train(self, case: Case) -> Case:
            return replace(case, image=case.image + torch.rand(1), label=case.label.long())

    stored(tmp_path)
    samples = FileSamples([tmp_path / "1.safetensors"], Shaken())
    one, same, other = (float(samples[Draw(0, seed)].image[0, 0, 0]) for seed in (1, 1, 2))
    assert 1 < one == same != other


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"x": torch.zeros(1)}, "holds no samples"),
        ({"images": torch.zeros(2, 1, 2, 2), "labels": torch.zeros(3)}, "holds no samples"),
        (b"no such format", "is not a readable safetensors file"),
        (None, "does not exist"),
    ],
)
def test_files_that_hold_no_samples(content: dict[str, torch.Tensor] | bytes | None, told: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        write_tensors(path, content)
    with pytest.raises(DataError, match=told):
        FileSamples([path])


@pytest.mark.parametrize("workers", [0, 2])
def test_files_beside_new_images_in_a_mix(workers: int, tmp_path: Path) -> None:
    mix = Mix((Batches(tensor_view(numbered(6), torch.ones(6, 4, 5).short(), SPACE), 2), Batches(stored(tmp_path), 3)))
    for batch in read_draws(BatchSampler(mix, seed=1, start=0, stop=5), collate, workers=workers, pin=False):
        assert batch is not None and batch.parts.tolist() == [0, 0, 1, 1, 1]
        old = batch.of(1)
        assert torch.equal(old.images[:, 0, 0, 0] + 1, old.labels[:, 0, 0].float())


def test_only_the_wanted_sample_of_a_shard_is_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "shard.safetensors"
    write_tensors(path, {"images": torch.zeros(64, 3, 64, 64), "labels": torch.zeros(64, 64, 64).short()})
    assert FileSamples([path])[5].image.untyped_storage().nbytes() == 3 * 64 * 64 * 4
