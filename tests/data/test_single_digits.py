"""Handwritten digits, one an image."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from sklearn.datasets import load_digits

from perdure.data.catalog import open_source
from perdure.data.check import inspect
from perdure.data.readers.digits import WRITERS
from perdure.data.readers.single_digits import open_single_digits
from perdure.data.source import SPLITS, Source
from perdure.errors import DataError, UsageError
from perdure.streams.lists import label_presence


def test_labels_are_those_of_the_collection_and_splits_go_by_writer() -> None:
    source = open_source("single_digits", None)
    assert isinstance(source, Source)
    assert (source.kind, source.patients, source.space.background) == ("classification", False, None)
    assert [len(source.names(s)) for s in SPLITS] == [1150, 287, 360]
    digits = load_digits().target
    for split in SPLITS:
        labels = [source.mask(split, name) for name in source.names(split)]
        assert {(label.shape, label.dtype) for label in labels} == {((), np.dtype(np.int16))}
        np.testing.assert_array_equal(np.array(labels), digits[slice(*WRITERS[split])] + 1)
    assert source.space.name(1) == "zero" and source.space.id_of("nine") == 10
    assert set(label_presence(source, "val").nonzero()[1]) == set(range(1, 11))


def test_images_are_smooth_enlargements() -> None:
    source, cells = open_single_digits(32), load_digits().images
    for name in source.names("val")[:20]:
        image = source.image("val", name)
        assert (image.shape, image.dtype) == ((1, 32, 32), np.uint8)
        small = image[0].reshape(8, 4, 8, 4).mean((1, 3))  # averages over cells are about the original's
        assert np.abs(small - cells[int(name)] * 255 / 16).mean() < 20
        jumps = np.abs(np.diff(image[0].astype(int), axis=1)).max()
        assert jumps < np.abs(np.diff(cells[int(name)] * 255 / 16, axis=1)).max() * 0.6
    np.testing.assert_array_equal(open_single_digits(8).image("train", "0000")[0], np.rint(cells[0] * 255 / 16))


def test_an_image_that_is_written_to_does_not_change_the_data() -> None:
    source = open_single_digits()
    source.image("train", "0003")[:] = 0
    assert source.image("train", "0003").any()


def test_samples_of_other_splits_and_wrong_sizes() -> None:
    source = pickle.loads(pickle.dumps(open_single_digits(12)))
    for split, name in (("train", "1150"), ("val", "0000"), ("test", "1797"), ("train", "1"), ("train", "abcd")):
        with pytest.raises(DataError, match=f"no sample '{name}' in split '{split}'"):
            source.mask(split, name)
    for size in (7, 257):
        with pytest.raises(UsageError, match=f"size is {size}"):
            open_single_digits(size)


def test_fingerprints_and_check() -> None:
    prints = {open_single_digits(size).fingerprint(split) for size in (8, 28) for split in SPLITS}
    assert len(prints) == 6
    found = inspect(open_single_digits(8))
    assert found.ok and not found.shared and sum(found.splits["test"].images.values()) == 360
