"""What every data set looks like to the rest of the house."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from perdure.errors import DataError
from perdure.labels import LabelSpace

Split = Literal["train", "val", "test"]
Kind = Literal["segmentation", "classification"]
SPLITS: Final[tuple[Split, ...]] = ("train", "val", "test")
Image = npt.NDArray[Any]
Mask = npt.NDArray[np.int16]


class AbsentSplitError(DataError):
    """The data set is sound as far as it goes, but does not have this split."""


@runtime_checkable
class Source(Protocol):
    """A labelled data set on disk or made on the fly. Reading is stateless and safe in worker processes.

    Attributes:
        name: Short name, e.g. ``"voc"``.
        kind: What a label describes: every pixel of an image (segmentation) or the image (classification).
        space: Its classes.
        patients: True where images come from patients: nothing of them may stay in a run folder.
        other_label: What classes outside the wanted ones become in views of ``val`` and ``test`` (STAR, section
            1.4): 0 where label 0 is a real background, ``IGNORE`` where it means "not annotated" (ADE20K).
            Training views always use 0.
    """

    name: str
    kind: Kind
    space: LabelSpace
    patients: bool
    other_label: int

    def names(self, split: Split) -> Sequence[str]:
        """Sample names of a split, in a fixed order. A split that is not there: :class:`AbsentSplitError`."""
        ...

    def image(self, split: Split, name: str) -> Image:
        """Image ``(C, *S)``, uint8 or float32. Unreadable file: DataError that names it."""
        ...

    def mask(self, split: Split, name: str) -> Mask:
        """Label map ``(*S)`` int16 in global ids, 0 background, ``IGNORE``. Unknown label: DataError.

        In classification the label of the whole image: an array of shape ``()``, never 0.
        """
        ...

    def fingerprint(self, split: Split) -> str:
        """Hex digest of names and masks of the split; equal digests mean equal image lists."""
        ...
