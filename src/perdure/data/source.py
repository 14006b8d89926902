"""What every data set looks like to the rest of the house."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from perdure.labels import LabelSpace

Split = Literal["train", "val", "test"]
Image = npt.NDArray[Any]
Mask = npt.NDArray[np.uint8]


@runtime_checkable
class Source(Protocol):
    """A labelled data set on disk or made on the fly. Reading is stateless and safe in worker processes.

    Attributes:
        name: Short name, e.g. ``"voc"``.
        space: Its classes.
        patients: True where images come from patients: nothing of them may stay in a run folder.
    """

    name: str
    space: LabelSpace
    patients: bool

    def names(self, split: Split) -> Sequence[str]:
        """Sample names of a split, in a fixed order. A split that the layout lacks is a DataError."""
        ...

    def image(self, split: Split, name: str) -> Image:
        """Image ``(C, *S)``, uint8 or float32. Unreadable file: DataError that names it."""
        ...

    def mask(self, split: Split, name: str) -> Mask:
        """Label map ``(*S)`` uint8 in global ids, 0 background, 255 ignore. Unknown label: DataError."""
        ...

    def fingerprint(self, split: Split) -> str:
        """Hex digest of names and masks of the split; equal digests mean equal image lists."""
        ...
