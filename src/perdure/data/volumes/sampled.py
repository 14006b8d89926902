"""What preparations share whose training samples are cut from cases that were prepared once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from perdure.data.case import Case
from perdure.data.preparation import Preparation
from perdure.data.volumes.options import LARGEST_SPACING, Augment
from perdure.errors import DataError

ANNOTATED: Final = -1
"""Key among the places of a case: those that are not ``IGNORE``, where some are."""


class Array(Protocol):
    """An array in memory or on disk: of the latter only what an index asks for is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its length along every axis."""
        ...

    def __getitem__(self, index: Any) -> Any: ...


Places = Mapping[int, npt.NDArray[np.uint16]]
"""Label in the source's ids -> where it is, ``(n, axes)`` with n > 0; at most some thousands of its places."""


@dataclass(frozen=True)
class Ready:
    """A case that was prepared for training.

    Args:
        image: ``(C, *s)`` float32.
        label: ``(*s)`` int16 in the source's ids, with ``IGNORE`` and -1 outside of the body.
        places: Where its labels are.
    """

    image: Array
    label: Array
    places: Places


class Sampled(Preparation):
    """Preparation of cases that are far larger than a training sample.

    They are prepared once, into working files, and samples are cut from those.

    Attributes:
        foreground: Share of samples centred on a labelled voxel, of a class drawn evenly among those of the case.
        augment: What is varied at random.
        modality: Names of the channels, where the data set tells them.
    """

    needs_working_files: ClassVar[bool] = True

    foreground: float = Field(0.33, ge=0, le=1)
    augment: Augment = "nnunet"
    modality: tuple[Annotated[str, Field(max_length=40)], ...] = ()

    @abstractmethod
    def ready(self, case: Case) -> Ready:
        """Prepare a whole raw case for training. Raises DataError where it cannot be."""

    @abstractmethod
    def cut(self, ready: Ready, seed: int) -> tuple[Tensor, Tensor]:
        """A sample of a prepared case, a pure function of the seed: ``(C, *patch)`` float32, ``(*patch)`` int64."""

    def train(self, case: Case) -> Case:
        """A sample of a raw case that has no working file: all of it is prepared for this one sample."""
        image, label = self.cut(self.ready(case), int(torch.randint(1 << 62, ()).item()))
        return replace(case, image=image, label=label)

    @property
    def accepted_channels(self) -> tuple[int, ...]:
        """Numbers of channels that a raw image may have."""
        return (self.channels,)

    @property
    def mirrors(self) -> tuple[int, ...]:
        """All axes, where anything is varied."""
        return () if self.augment == "none" else tuple(range(self.dims))

    def spot(self, places: Places, draw: np.random.Generator) -> npt.NDArray[np.int64] | None:
        """A place that a sample has to show; ``None`` where it may lie anywhere."""
        labels = sorted(label for label in places if label != ANNOTATED)
        if draw.random() < self.foreground and labels:
            chosen = places[labels[draw.integers(len(labels))]]
        elif ANNOTATED in places:
            chosen = places[ANNOTATED]  # a sample without any annotation teaches nothing
        else:
            return None
        place: npt.NDArray[np.int64] = chosen[draw.integers(len(chosen))].astype(np.int64)
        return place


def called(case: Case) -> str:
    """The name of a case in a message; images that are predicted have none."""
    return f"'{case.name}'" if case.name else "the image"


def spacing_of(case: Case) -> tuple[float, ...]:
    """Spacing of a volume in mm; 1 along each axis where nothing is known. Raises DataError where it is impossible."""
    spacing = case.geometry.spacing or (1.0, 1.0, 1.0)
    if len(spacing) != 3 or not all(0 < value <= LARGEST_SPACING for value in spacing):
        raise DataError(
            f"{called(case)} has voxels of {' × '.join(f'{value:g}' for value in spacing)} mm",
            f"correct the spacing in the file: three sizes above 0 and of at most {LARGEST_SPACING:g} mm are needed",
        )
    return spacing


def checked(case: Case, axes: Sequence[int], channels: Sequence[int] = ()) -> npt.NDArray[np.float32]:
    """The raw image of a case as float32, a copy.

    Args:
        case: The case; its label is looked at where it is a map.
        axes: Numbers of spatial axes that are taken.
        channels: Numbers of channels that are taken; all where there are none.

    Raises:
        DataError: The image is another one, or holds values that are no numbers.
    """
    found = case.image.ndim - 1
    if found not in axes:
        raise DataError(
            f"{called(case)} has {found} axes, and images of {' or '.join(map(str, axes))} axes are needed",
            "volumes and single images need a model each",
        )
    if channels and case.image.shape[0] not in channels:
        raise DataError(
            f"{called(case)} has {case.image.shape[0]} channels, and {' or '.join(map(str, channels))} are needed",
            "give images with the same channels, in the same order, as those of the first task",
        )
    image: npt.NDArray[np.float32] = case.image.numpy().astype(np.float32)
    if not np.isfinite(image).all():
        raise DataError(
            f"{called(case)} holds voxels that are no numbers (NaN or infinite)", "correct the image or leave it out"
        )
    return image
