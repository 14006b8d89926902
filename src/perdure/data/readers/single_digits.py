"""Built-in classification data: scikit-learn's real handwritten digits, one per image.

1,797 grey images of 8×8 (UCI optical recognition), enlarged by bicubic interpolation. They are ordered by writer. The
splits are those of :mod:`perdure.data.readers.digits`, so test images come from other writers than training images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image as Pil

from perdure.data.readers.digits import CLASSES, WRITERS
from perdure.data.source import Image, Kind, Mask, Source, Split
from perdure.errors import DataError, UsageError
from perdure.labels import LabelSpace, label_space

VERSION: Final = 1  # of the enlargement


@dataclass(frozen=True, eq=False)
class SingleDigits(Source):
    """One digit per image; implements :class:`~perdure.data.source.Source`. Class ids are digit + 1.

    Args:
        size: Height and width in pixels.
    """

    size: int = 28
    name: str = field(default="single_digits", init=False)
    kind: Kind = field(default="classification", init=False)
    space: LabelSpace = field(default_factory=lambda: label_space(CLASSES, background=None), init=False)
    patients: bool = field(default=False, init=False)
    other_label: int = field(default=0, init=False)

    def names(self, split: Split) -> Sequence[str]:
        """Positions in scikit-learn's collection: ``0000`` to ``1796``."""
        return tuple(f"{k:04d}" for k in range(*WRITERS[split]))

    def image(self, split: Split, name: str) -> Image:
        """Grey image ``(1, size, size)`` uint8, white ink on black."""
        pixels: Image = _collection(self.size)[0][self._place(split, name)]
        return pixels[None].copy()  # the cached collection must not change through a sample

    def mask(self, split: Split, name: str) -> Mask:
        """Digit + 1, shape ``()``."""
        return np.asarray(_collection(self.size)[1][self._place(split, name)])

    def fingerprint(self, split: Split) -> str:
        """Digest of the labels, the split and the size."""
        first, last = WRITERS[split]
        digest = hashlib.blake2b(_collection(self.size)[1][first:last].tobytes(), digest_size=16)
        digest.update(repr((VERSION, first, last, self.size)).encode())
        return digest.hexdigest()

    def _place(self, split: Split, name: str) -> int:
        if not (name.isdecimal() and len(name) == 4 and int(name) in range(*WRITERS[split])):
            raise DataError(f"single_digits has no sample '{name}' in split '{split}'")
        return int(name)


def open_single_digits(size: int = 28) -> SingleDigits:
    """Open the digits: 1,150 images for training, 287 for validation and 360 for testing.

    Args:
        size: Height and width in pixels.

    Raises:
        UsageError: The size is out of range.
    """
    if not 8 <= size <= 256:
        raise UsageError(f"single_digits: size is {size}", "8 to 256 pixels")
    return SingleDigits(size)


@cache
def _collection(size: int) -> tuple[npt.NDArray[np.uint8], Mask]:
    """All digits enlarged, ``(1797, size, size)``, and their class ids ``(1797,)``. Computed once per process."""
    from sklearn.datasets import load_digits

    small, digits = load_digits(return_X_y=True)
    cells = small.reshape(-1, 8, 8).astype(np.float32) * (255 / 16)
    resized = [Pil.fromarray(cell).resize((size, size), Pil.Resampling.BICUBIC) for cell in cells]
    large = np.stack([np.asarray(picture) for picture in resized])
    return np.clip(np.rint(large), 0, 255).astype(np.uint8), (digits + 1).astype(np.int16)
