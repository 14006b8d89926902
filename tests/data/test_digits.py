"""Built-in digit scenes."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest

from perdure.data.check import inspect
from perdure.data.readers.digits import WRITERS, Digits, open_digits
from perdure.data.source import AbsentSplitError, Source


def scenes(source: Digits, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    names = source.names(split)
    return np.stack([source.image(split, n) for n in names]), np.stack([source.mask(split, n) for n in names])


def test_scenes_are_a_function_of_the_seed() -> None:
    images, masks = scenes(open_digits(train=12, seed=3))
    again, masks_again = scenes(open_digits(train=40, seed=3))
    np.testing.assert_array_equal(images, again[:12])  # asking for more scenes keeps the first ones
    np.testing.assert_array_equal(masks, masks_again[:12])
    other, _ = scenes(open_digits(train=12, seed=4))
    assert not any(np.array_equal(a, b) for a, b in zip(images, other, strict=True))
    source = open_digits(train=12, seed=3)
    backwards = [source.image("train", n) for n in reversed(source.names("train"))]
    np.testing.assert_array_equal(np.stack(backwards[::-1]), images)


def test_scenes_hold_what_was_asked_for() -> None:
    source = open_digits(train=60, per_scene=(2, 3), size=48)
    assert isinstance(source, Source)
    images, masks = scenes(source)
    assert images.shape == (60, 3, 48, 48)
    assert (images.dtype, masks.dtype) == (np.uint8, np.int16)
    digits = np.asarray([len(np.setdiff1d(m, [0])) for m in masks])
    assert digits.max() == 3
    assert digits.min() >= 1  # one digit may lie on another, hardly ever wholly
    assert (digits >= 2).mean() > 0.9
    assert set(np.unique(masks)) == set(range(11))
    assert 0.05 < (masks > 0).mean() < 0.3
    assert source.space.name(1) == "zero"
    assert source.space.name(10) == "nine"


def test_digits_stand_out_from_the_ground() -> None:
    images, masks = scenes(open_digits(train=60))
    light = images.mean(1)
    differences = [
        abs(light[n][masks[n] == k].mean() - light[n][masks[n] == 0].mean())
        for n in range(60)
        for k in np.unique(masks[n])[1:]
    ]
    assert np.mean(np.asarray(differences) > 25) > 0.9
    assert np.std([i.mean() for i in images]) > 20  # and scenes differ


def test_test_scenes_show_other_handwriting() -> None:
    ranges = sorted(WRITERS.values())
    assert ranges[0][0] == 0
    assert ranges[-1][1] == 1797
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    source = open_digits(train=3, test=3)
    assert not np.array_equal(source.image("train", "00000"), source.image("test", "00000"))


def test_fingerprint_follows_every_parameter() -> None:
    variants = [
        open_digits(), open_digits(seed=1), open_digits(size=48), open_digits(train=7), open_digits(per_scene=(1, 4)),
    ]  # fmt: skip
    assert len({v.fingerprint("train") for v in variants}) == len(variants)
    assert open_digits().fingerprint("train") == open_digits().fingerprint("train")
    assert open_digits(train=7).fingerprint("test") == open_digits().fingerprint("test")


def test_scenes_are_painted_once_and_not_sent_to_workers() -> None:
    source = open_digits(train=2)
    first = source.image("train", "00001")
    assert source.image("train", "00001") is first
    copy = pickle.loads(pickle.dumps(source))
    assert not copy._painted
    np.testing.assert_array_equal(copy.image("train", "00001"), first)


def test_check_and_absent_split() -> None:
    source = open_digits(train=5, val=0, test=2)
    found = inspect(source)
    assert found.ok
    assert list(found.absent) == ["val"]
    with pytest.raises(AbsentSplitError):
        source.names("val")
