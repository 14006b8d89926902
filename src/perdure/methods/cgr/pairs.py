"""Stored pairs: how they lie in a file, who made them, and who may read them (spec CGR 4.3, 4.4).

A file holds ``images (n, C, H, W)`` uint8 and ``labels (n, H, W)`` uint8 with local codes, and a manifest in tensors of
its own. Files stand in the run's store, are never changed and have the hash that the ledger lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from perdure.data.case import Case
from perdure.errors import DataError
from perdure.files import read_tensors
from perdure.methods.cgr.codecs import VERSION, from_bytes, to_global
from perdure.methods.past import Mirrored

CHANGED: Final = "the file was changed or belongs to another task: start a new run"
LISTS: Final = frozenset({"generator", "subsets", "histogram", "nearest", "limits"})
"""Fields of a manifest that are vectors; ``fit`` is a fraction, the others are whole numbers."""
UNKNOWN: Final = torch.full((2,), torch.nan)


class Manifest(NamedTuple):
    """Where the pairs of a file come from.

    Args:
        stage: Task at whose end they were made.
        task: Task that they look like.
        file: Number of the file among those of this task; with the run's seed it gives the noise.
        generator: SHA-256 of the generator's weights, ``(32,)`` uint8.
        codec: Version of the coding of images and masks.
        subsets: ``(n,)`` int64: the prompt of each pair, as the subset of classes that it names.
        histogram: ``(classes + 1,)`` int64, pixels per local code.
        tried: Pairs that were made; those that failed the gate are not in the file where it is on.
        sound: How many of them passed the gate, whether it is on or not.
        fit: Dice between the masks and what the segmenter sees in the images, mean over the pairs made.
        copies: How many were taken for copies of real images, and are not in the file.
        nearest: ``(2,)`` float32: least distances to a real image, see :mod:`perdure.methods.cgr.copies`; NaN where
            nothing was compared.
        limits: ``(2,)`` float32, distances below which an image is a copy.
    """

    stage: int
    task: int
    file: int
    generator: Tensor
    codec: int
    subsets: Tensor
    histogram: Tensor
    tried: int
    sound: int
    fit: float
    copies: int = 0
    nearest: Tensor = UNKNOWN
    limits: Tensor = UNKNOWN

    def tensors(self) -> dict[str, Tensor]:
        """As entries of a file."""
        return {f"manifest.{name}": torch.as_tensor(value) for name, value in self._asdict().items()}


def read_manifest(path: Path) -> Manifest:
    """The manifest of a file of pairs. Raises DataError where the file has none, or none that a run writes."""
    found = read_tensors(path, [f"manifest.{name}" for name in Manifest._fields])
    values: dict[str, Any] = {}
    for key, value in found.items():
        name = key.removeprefix("manifest.")
        kind = "list" if value.ndim == 1 else "fraction" if value.is_floating_point() else "number"
        wanted = "list" if name in LISTS else "fraction" if name == "fit" else "number"
        if value.ndim > 1 or kind != wanted:
            raise DataError(f"{_called(path)}: '{key}' is no {wanted}", CHANGED)
        values[name] = value if value.ndim else value.item()
    return Manifest(**values)


def check_content(path: Path, channels: int, classes: int, size: Sequence[int]) -> None:
    """Raise DataError unless a file holds images and codes of a task, as they are read one by one later.

    Args:
        path: The file.
        channels: Channels of its images.
        classes: Classes of the task.
        size: Height and width.
    """
    found = read_tensors(path)
    more = sorted(found.keys() - {"images", "labels", *(f"manifest.{name}" for name in Manifest._fields)})
    if more:
        raise DataError(f"{_called(path)} holds more than pairs: '{more[0]}'", CHANGED)
    images, codes = found["images"], found["labels"]
    sound = images.dtype == codes.dtype == torch.uint8 and images.shape[1:] == (channels, *size)
    if not sound or codes.shape != (len(images), *size) or (codes.numel() and int(codes.max()) > classes):
        raise DataError(
            f"{_called(path)} does not hold pairs of {classes} classes in images of {channels} channels and "
            f"{size[0]} × {size[1]} pixels",
            CHANGED,
        )


def _called(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def check_causality(found: Sequence[Manifest], task: int, stage: int, generators: Tensor) -> None:
    """Raise DataError unless pairs that stage ``stage`` trains on were made before it, by the generator as it was then.

    Args:
        found: Manifests of the files, in order.
        task: The task that they look like.
        stage: The task under way.
        generators: ``(T, 32)`` uint8, hash of the generator after each stage.
    """
    for number, one in enumerate(found):
        if (one.task, one.file) != (task, number):
            raise DataError(
                f"file {one.file + 1} of pairs of task {one.task + 1} stands for file {number + 1} of task {task + 1}",
                "files of pairs were exchanged: start a new run",
            )
        if not 0 <= one.stage < stage or not torch.equal(one.generator, generators[one.stage].cpu()):
            by = "another generator" if 0 <= one.stage < stage else f"the generator of task {one.stage + 1}"
            raise DataError(
                f"generated pairs that task {stage + 1} would train on were made by {by}",
                "only pairs made at the end of an earlier task of the same run may be replayed: start a new run",
            )
        if one.codec != VERSION:
            raise DataError(f"generated pairs are stored in version {one.codec} of the coding, not {VERSION}")


class StoredPairs(Mirrored):
    """Stored bytes and local codes as a network sees them, every other time mirrored along one axis.

    Attributes:
        black: What 0 becomes, per channel.
        white: What 255 becomes.
        ids: Global ids of the local codes 1, 2, ...
    """

    black: tuple[float, ...]
    white: tuple[float, ...]
    ids: tuple[int, ...]

    def train(self, case: Case) -> Case:
        """Image ``(C, H, W)`` float32 and label ``(H, W)`` int64 in global ids."""
        image, label = from_bytes(case.image, (self.black, self.white)), to_global(case.label, self.ids)
        return super().train(replace(case, image=image, label=label))
