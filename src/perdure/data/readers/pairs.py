"""Data sets of image files and index-mask files: the one reader of all photograph layouts.

A layout provides only data: a function that lists the files of a split, a label space, and a table from the numbers in
the mask files to global ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from perdure.data.readers.imagefiles import read_image, read_index_mask
from perdure.data.readers.listing import Pair
from perdure.data.source import Image, Kind, Mask, Source, Split
from perdure.errors import DataError
from perdure.labels import BACKGROUND, IGNORE, IGNORE_IN_FILES, LabelSpace

UNKNOWN = -1
Decoder = npt.NDArray[np.int16]
"""Table ``(65536,)``: number in a mask file -> global id, or -1 for numbers without a meaning."""


def decoder(raw_to_id: Mapping[int, int], other: int = UNKNOWN) -> Decoder:
    """Build a :data:`Decoder`. Numbers that are not listed become ``other``."""
    table = np.full(1 << 16, other, np.int16)
    table[list(raw_to_id)] = list(raw_to_id.values())
    return table


def identity(space: LabelSpace) -> Decoder:
    """Decoder of masks that hold global ids. 255 becomes IGNORE, unless the space has a class 255."""
    return decoder({IGNORE_IN_FILES: IGNORE, BACKGROUND: BACKGROUND} | {k: k for k in space.ids})


@dataclass(frozen=True, eq=False)
class PairSource(Source):
    """Images with masks of class numbers; implements :class:`~perdure.data.source.Source`.

    Args:
        name: Short name of the data set.
        space: Its classes.
        lister: Split -> files of its samples by name, in order. Called once per split.
        decode: Table from the numbers in the mask files to global ids.
        remedy: Hint of the error for a number that ``decode`` does not list.
        other_label: See :class:`~perdure.data.source.Source`.
        patients: See :class:`~perdure.data.source.Source`.
    """

    name: str
    space: LabelSpace
    lister: Callable[[Split], Mapping[str, Pair]]
    decode: Decoder
    remedy: str
    other_label: int = 0
    patients: bool = False
    kind: Kind = field(default="segmentation", init=False)
    _listed: dict[Split, Mapping[str, Pair]] = field(default_factory=dict, init=False, repr=False)

    def pairs(self, split: Split) -> Mapping[str, Pair]:
        """Files of every sample of a split, in order. Raises DataError if list and files do not match."""
        if split not in self._listed:
            self._listed[split] = self.lister(split)
        return self._listed[split]

    def names(self, split: Split) -> Sequence[str]:
        """Sample names in the order of the list, or sorted if the layout has no list."""
        return tuple(self.pairs(split))

    def image(self, split: Split, name: str) -> Image:
        """RGB image ``(3, H, W)`` uint8."""
        return read_image(self._pair(split, name).image)

    def mask(self, split: Split, name: str) -> Mask:
        """Label map ``(H, W)`` int16 in global ids. Unknown number: DataError with file and position."""
        path = self._pair(split, name).mask
        raw = read_index_mask(path)
        ids = self.decode.take(raw)
        if ids.size and ids.min() < 0:
            row, column = np.argwhere(ids < 0)[0]
            raise DataError(
                f"{path} has label {raw[row, column]} (row {row}, column {column}; {np.count_nonzero(ids < 0)} pixels "
                f"are outside the class list)",
                self.remedy,
            )
        return ids

    def fingerprint(self, split: Split) -> str:
        """BLAKE2 digest of class ids, decoding, sample names and the bytes of every mask file."""
        pairs = self.pairs(split)
        digest = hashlib.blake2b(self.decode.tobytes(), digest_size=16)
        digest.update(repr(self.space.ids).encode())
        with ThreadPoolExecutor() as pool:
            for name, content in zip(pairs, pool.map(_digest, pairs.values()), strict=True):
                digest.update(name.encode() + b"\0" + content)
        return digest.hexdigest()

    def _pair(self, split: Split, name: str) -> Pair:
        try:
            return self.pairs(split)[name]
        except KeyError:
            raise DataError(f"{self.name} has no sample '{name}' in split '{split}'") from None


def _digest(pair: Pair) -> bytes:
    try:
        return hashlib.blake2b(pair.mask.read_bytes(), digest_size=16).digest()
    except OSError as error:
        raise DataError(f"{pair.mask} cannot be read: {error.strerror}", "restore the file") from error
