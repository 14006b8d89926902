"""A data set in memory and a counted stand-in for reading masks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from perdure.data.preparation import Preparation
from perdure.data.source import AbsentSplitError, Source
from perdure.labels import BACKGROUND, TABLE_SIZE, LabelSpace, label_space
from perdure.streams import lists


class FakeSource(Source):
    """Samples ``NAME: labels``; the mask holds the labels one after the other, the image is grey."""

    def __init__(self, splits: Mapping[str, Mapping[str, Sequence[int]]], space: LabelSpace, **more) -> None:
        self.splits = {split: dict(samples) for split, samples in splits.items()}
        self.name = more.get("name", "fake")
        self.kind = "segmentation"
        self.space = space
        self.patients = more.get("patients", False)
        self.other_label = more.get("other_label", BACKGROUND)

    def names(self, split):
        if split not in self.splits:
            raise AbsentSplitError(f"{self.name} has no split {split}")
        return list(self.splits[split])

    def mask(self, split, name):
        return np.asarray([self.splits[split][name]], np.int16)

    def image(self, split, name):
        return np.full((3, *self.mask(split, name).shape), 128, np.uint8)

    def fingerprint(self, split):
        return hashlib.sha256(repr(self.splits[split]).encode()).hexdigest()


@pytest.fixture
def transform():
    return Preparation()


@pytest.fixture
def make_source() -> Callable[..., FakeSource]:
    """``make_source(names, train=..., val=..., test=...)``; one split for all if only ``samples`` is given."""

    def make(classes: Sequence[str], samples=None, space=None, name="fake", other_label=0, patients=False, **splits):
        if samples is not None:
            splits = {"train": samples, "val": samples, "test": samples}
        space = space or label_space(list(classes))
        return FakeSource(splits, space, name=name, other_label=other_label, patients=patients)

    return make


@pytest.fixture(autouse=True)
def reads(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[tuple[str, str]]:
    """Replaces the reading of masks by a plain loop and records (source, split) of every call."""
    calls: list[tuple[str, str]] = []
    if request.node.get_closest_marker("real"):
        return calls

    def label_presence(source, split):
        calls.append((source.name, split))
        rows = np.zeros((len(source.names(split)), TABLE_SIZE), bool)
        for row, name in enumerate(source.names(split)):
            rows[row, np.unique(source.mask(split, name))] = True
        return rows

    monkeypatch.setattr(lists, "label_presence", label_presence)
    return calls
