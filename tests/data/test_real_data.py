"""Readers on small real data sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from perdure.data.catalog import open_source
from perdure.data.check import inspect
from perdure.labels import IGNORE, TABLE_SIZE
from perdure.streams.lists import label_presence

pytestmark = pytest.mark.real


def test_camvid(shared_data: Path) -> None:
    source = open_source("camvid", shared_data / "camvid")
    assert [len(source.names(s)) for s in ("train", "val", "test")] == [367, 101, 233]
    found = inspect(source, ("val",))
    assert found.ok
    assert found.splits["val"].smallest == found.splits["val"].largest == (180, 240)
    assert found.splits["val"].pixels[0] == 0  # every pixel has a class or is void
    assert not found.unused("val")
    present = label_presence(source, "train")
    assert present.shape == (367, TABLE_SIZE)
    assert set(np.flatnonzero(present.any(0))) == {*range(1, 12), IGNORE}


def test_camvid_at_full_resolution_shows_the_same_scenes(shared_data: Path) -> None:
    full, small = open_source("camvid", shared_data / "camvid_fullres"), open_source("camvid", shared_data / "camvid")
    found = inspect(full)
    assert found.ok
    assert [r.samples for r in found.splits.values()] == [6, 6, 6]
    for name in full.names("train"):
        big = full.mask("train", name)
        assert big.shape == (360, 480)
        shares = [np.bincount(m.ravel(), minlength=TABLE_SIZE) / m.size for m in (big, small.mask("train", name))]
        np.testing.assert_allclose(shares[0], shares[1], atol=0.02)


def test_voc_sample(shared_data: Path) -> None:
    for root in ("voc_sample", "voc_sample/VOCdevkit", "voc_sample/VOCdevkit/VOC2012"):
        source = open_source("voc", shared_data / root)
        assert source.names("train") == ("2011_000003", "2011_000006")
    assert source.space.name(16) == "pottedplant"
    assert inspect(source).ok
    assert {5, 15} & set(np.unique(source.mask("train", "2011_000003")).tolist())


def test_ade20k_sample(shared_data: Path) -> None:
    found = inspect(open_source("ade20k", shared_data / "ade20k_sample"))
    assert found.ok
    assert list(found.absent) == ["train", "val"]
    assert found.splits["test"].samples == 3


def test_clothing_in_voc_layout(shared_data: Path) -> None:
    source = open_source("voc", shared_data / "ccp_voc_layout")
    assert len(source.space) == 58
    assert source.space.name(0) == "null"
    assert [len(source.names(s)) for s in ("train", "test")] == [252, 83]
    present = label_presence(source, "train")
    assert (present.any(0)).sum() == 53
    assert (present.sum(0) >= 20).sum() == 23
    found = inspect(source, ("test",))
    assert found.ok
