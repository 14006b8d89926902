"""What every data set looks like to the rest of the program."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from perdure.errors import DataError, PerdureError
from perdure.labels import LabelSpace

if TYPE_CHECKING:
    from perdure.data.case import Case

Split = Literal["train", "val", "test"]
Measured = Literal["test", "val"]
MEASURED: Final[dict[Measured, str]] = {"test": "test", "val": "validation"}
"""Splits that figures may be measured on, with the word for their images."""
Kind = Literal["segmentation", "classification"]
SPLITS: Final[tuple[Split, ...]] = ("train", "val", "test")
Image = npt.NDArray[np.uint8 | np.float32]
Mask = npt.NDArray[np.int16]
Labels = npt.NDArray[np.int16]
Number = TypeVar("Number", bound=np.generic)


class AbsentSplitError(DataError):
    """The data set is sound as far as it goes, but does not have this split."""


class UnknownLabelError(DataError):
    """A mask holds numbers that mean nothing. ``labels`` are all of them."""

    def __init__(self, what: str, hint: str = "", labels: tuple[int, ...] = ()) -> None:
        super().__init__(what, hint)
        self.labels = labels


def distinct(mask: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """Values of a mask of any shape, ``(n,)``: each of them at least once, in no order.

    Only the last value of each run of equal ones is taken. A mask of 500 x 375 has a few thousand runs, and finding
    them compares neighbours: 0.07 ms, where ``np.bincount`` takes 0.24 ms and ``np.unique``, which sorts, 0.8 ms.
    """
    flat = mask.ravel()
    return np.append(flat[:-1][flat[1:] != flat[:-1]], flat[-1:])


def size_text(shape: Sequence[int]) -> str:
    """A spatial shape as people and image viewers give it: width first, ``(36, 40)`` -> ``40×36``."""
    return "×".join(map(str, reversed(shape)))


def no_validation(source: str, why: str) -> AbsentSplitError:
    """The error of a data set without validation images; the test images never stand in for them."""
    return AbsentSplitError(
        f"{source} has no validation set: {why}",
        "validation=10 under data (data.validation=10 as an override) takes every 10th training image for it",
    )


class Source(ABC):
    """A labelled data set on disk or made on the fly. Reading is stateless and safe in worker processes.

    Attributes:
        name: Short name, e.g. ``"voc"``.
        kind: What a label describes: every pixel of an image (segmentation) or the image (classification).
        space: Its classes.
        patients: True where images come from patients: nothing of them may stay in a run folder.
        other_label: What classes outside the wanted ones become in ``val`` and ``test`` (STAR, spec 1.4): 0 where
            label 0 is a real background, ``IGNORE`` where it means "not annotated" (ADE20K). In training always 0.
        dims: Spatial axes of its images: 3 for volumes.
        modality: Names of the channels, as nnU-Net has them (``("CT",)``); ``()`` where they are unknown.
    """

    name: str
    kind: Kind
    space: LabelSpace
    patients: bool
    other_label: int
    dims: Literal[2, 3] = 2
    modality: tuple[str, ...] = ()

    @abstractmethod
    def names(self, split: Split) -> Sequence[str]:
        """Sample names of a split, in a fixed order. A split that is not there: :class:`AbsentSplitError`."""

    def listing(self, split: Split) -> tuple[Sequence[str], Sequence[DataError]]:
        """Names whose files are all there, and what is wrong with the others, for a check that goes on after a problem.

        A source that can tell the two apart overrides this; its other functions then take those names. By default a
        split is listed as a whole or not at all.
        """
        return self.names(split), ()

    def size_error(self, split: Split, name: str, image: Sequence[int], mask: Sequence[int]) -> DataError:
        """The error of an image and a mask of different spatial shapes."""
        paths = [*map(str, self.files(split, name))]
        first, second = paths if len(paths) == 2 else ("", "")
        return DataError(
            f"{self.name}: image and mask of '{name}' differ in size (width×height): "
            f"{' '.join(filter(None, ('image', first, size_text(image))))}, "
            f"{' '.join(filter(None, ('mask', second, size_text(mask))))}",
            "the photograph may have a rotation flag (EXIF), which is applied: turn the mask too, or save both upright"
            if tuple(mask) == tuple(image)[::-1]
            else "make the mask at the image's size",
        )

    @abstractmethod
    def image(self, split: Split, name: str) -> Image:
        """Image ``(C, *S)``, uint8 or float32. Unreadable file: DataError that names it."""

    @abstractmethod
    def mask(self, split: Split, name: str) -> Mask:
        """Label map ``(*S)`` int16 in global ids, 0 background, ``IGNORE``. Unknown label: DataError.

        In classification the label of the whole image: an array of shape ``()``, never 0.
        """

    @abstractmethod
    def fingerprint(self, split: Split) -> str:
        """Hex digest of names and masks of the split; equal digests mean equal image lists."""

    def files(self, split: Split, name: str) -> Sequence[Path]:  # noqa: ARG002
        """The files that a sample is read from.

        A check of a sample is remembered by their sizes and times of change. Without files, as by default, the sample
        is read anew by every check.
        """
        return ()

    def reading(self) -> bytes:
        """All that decides besides the files whether a sample can be used, such as the classes; for the same memory."""
        return repr((self.name, self.kind, self.space.ids)).encode()

    def distinct_labels(self, split: Split, name: str) -> Labels:
        """The labels that a sample shows, each once or more often, ``(n,)`` int16: what image lists are made of.

        A source that can tell them without the whole mask overrides this.
        """
        return distinct(self.mask(split, name))

    def group(self, split: Split, name: str) -> str:  # noqa: ARG002
        """What must not be divided between splits, such as a patient; the name if there is nothing larger."""
        return name

    def read(self, split: Split, name: str) -> Case:
        """One case with all that the data set knows of it.

        A source whose cases have a spacing, belong to patients or annotate classes of their own overrides this.
        """
        import torch  # here and not above, so that the command line lists data sets without loading it

        from perdure.data.case import Case

        image, mask = self.image(split, name), self.mask(split, name)
        # negative strides (flipped views of files) cannot become tensors, and torch warns of pixels that Pillow locks
        image, mask = np.require(image, requirements=("C", "W")), np.require(mask, requirements=("C", "W"))
        return Case(torch.from_numpy(image), torch.from_numpy(mask), name, group=self.group(split, name))


def read_arrays(source: Source, split: Split, name: str) -> tuple[Image, Mask]:
    """Image and mask of a sample as they are stored; whatever a reader of one's own raises becomes a DataError."""
    try:
        return source.image(split, name), source.mask(split, name)
    except (PerdureError, MemoryError):
        raise
    except Exception as error:
        what = f"{source.name}: '{name}' cannot be read: {type(error).__name__}: {error}"
        raise DataError(what, "correct the reader or the file") from error
