"""Volumes for tests, made in memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from perdure.data.case import Case, Geometry
from perdure.data.source import Source
from perdure.labels import IGNORE, label_space


@pytest.fixture(autouse=True)
def _installed() -> None:
    if importlib.util.find_spec("nnunetv2") is None:
        pytest.skip("the extra 'volumes' is not installed")


@dataclass
class Volumes(Source):
    """Cases that are given, all of them in every split."""

    cases: Sequence[Case]
    modality: tuple[str, ...] = ()
    dims: int = 3
    reads: list[str] = field(default_factory=list)
    name = "volumes"
    kind = "segmentation"
    patients = True
    other_label = 0
    space = label_space(["front", "back"])

    def names(self, split: str) -> list[str]:
        return [case.name for case in self.cases]

    def read(self, split: str, name: str) -> Case:
        self.reads.append(name)
        return next(case for case in self.cases if case.name == name)

    def image(self, split: str, name: str) -> np.ndarray:
        return self.read(split, name).image.numpy()

    def mask(self, split: str, name: str) -> np.ndarray:
        return self.read(split, name).label.numpy()

    def fingerprint(self, split: str) -> str:
        return "volumes"


def ellipsoid(
    number: int,
    size: tuple[int, ...] = (18, 26, 22),
    spacing: tuple[float, ...] = (2.0, 1.0, 1.0),
    channels: int = 1,
    border: int = 0,
    ignored: bool = False,
) -> Case:
    """A body with two structures, different for every number; black around it where there is a border."""
    draw = np.random.default_rng(number)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in size), indexing="ij")
    middle = draw.uniform(-0.15, 0.15, len(size))
    distance = sum(((axis - at) / 0.6) ** 2 for axis, at in zip(axes, middle, strict=True))
    label = np.zeros(size, np.int16)
    label[distance < 1] = 1
    label[(distance < 1) & (axes[-1] > middle[-1])] = 2
    image = 100.0 + 80.0 * label + draw.normal(0, 15, (channels, *size))
    if ignored:
        label[size[0] // 2 :] = IGNORE
    if border:
        inside = np.zeros(size, bool)
        inside[tuple(slice(border, n - border) for n in size)] = True
        image[:, ~inside] = 0
        label[~inside] = 0
    return Case(
        torch.from_numpy(image.astype(np.float32)),
        torch.from_numpy(label),
        f"patient {number}",
        geometry=Geometry(spacing, "mm"),
        group=f"patient {number}",
    )


@pytest.fixture
def phantoms() -> Callable[..., Volumes]:
    """Call it with a number of cases and what all of them have."""

    def make(count: int = 3, modality: tuple[str, ...] = (), **shape: object) -> Volumes:
        cases = [ellipsoid(number, **shape) for number in range(count)]  # type: ignore[arg-type]
        return Volumes(cases, modality, cases[0].image.ndim - 1)

    return make
