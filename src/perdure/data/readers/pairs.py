"""Data sets of image files and index-mask files: the one reader of all photograph layouts.

A layout provides only data: a function that lists the files of a split, a label space, and a table from the numbers in
the mask files to global ids. :func:`folder_pairs` and :func:`list_pairs` list files by folders and by an image list.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from perdure.data.readers.imagefiles import IMAGE_SUFFIXES, MASK_SUFFIXES, read_image, read_index_mask
from perdure.data.source import AbsentSplitError, Image, Kind, Labels, Mask, Source, Split, distinct
from perdure.errors import DataError
from perdure.labels import BACKGROUND, IGNORE, IGNORE_IN_FILES, LabelSpace

UNKNOWN = -1
Decoder = npt.NDArray[np.int16]
"""Table ``(65536,)``: number in a mask file -> global id, or -1 for numbers without a meaning."""


class Pair(NamedTuple):
    """The two files of a sample."""

    image: Path
    mask: Path


def decoder(raw_to_id: Mapping[int, int]) -> Decoder:
    """Build a :data:`Decoder`. Numbers that are not listed become -1."""
    table = np.full(1 << 16, UNKNOWN, np.int16)
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
        lister: Lists image and mask files by sample name for a split; called once per split.
        decode: Table from the numbers in mask files to global ids.
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
        if ids.min(initial=BACKGROUND) < 0:
            row, column = np.argwhere(ids < 0)[0]
            raise DataError(
                f"{path} has label {raw[row, column]} (row {row}, column {column}; {np.count_nonzero(ids < 0)} pixels "
                f"are outside the class list)",
                self.remedy,
            )
        return ids

    def file_of(self, split: Split, name: str) -> Path:
        """The image file."""
        return self._pair(split, name).image

    def distinct_labels(self, split: Split, name: str) -> Labels:
        """The labels of a mask. Only numbers that it holds are decoded: a quarter less time than for every pixel."""
        ids = self.decode.take(distinct(read_index_mask(self._pair(split, name).mask)))
        return ids if ids.min(initial=BACKGROUND) >= 0 else self.mask(split, name)  # which says where the number is

    def fingerprint(self, split: Split) -> str:
        """BLAKE2 digest of class ids, decoding, sample names and the bytes of every mask file."""
        pairs = self.pairs(split)
        digest = hashlib.blake2b(self.decode.tobytes(), digest_size=16)
        digest.update(repr(self.space.ids).encode())

        def content(pair: Pair) -> bytes:
            try:
                return hashlib.blake2b(pair.mask.read_bytes(), digest_size=16).digest()
            except OSError as error:
                raise DataError(f"{pair.mask} cannot be read: {error.strerror}", "restore the file") from error

        with ThreadPoolExecutor() as pool:  # reading and hashing release the GIL
            for name, part in zip(pairs, pool.map(content, pairs.values()), strict=True):
                digest.update(name.encode() + b"\0" + part)
        return digest.hexdigest()

    def _pair(self, split: Split, name: str) -> Pair:
        try:
            return self.pairs(split)[name]
        except KeyError:
            raise DataError(f"{self.name} has no sample '{name}' in split '{split}'") from None


def folder_pairs(
    images: Path, masks: Path, endings: tuple[str, str] = ("", ""), nested: bool = False, split: str = ""
) -> dict[str, Pair]:
    """Pair the images of one folder and the masks of another that have the same name, in name order.

    Args:
        images: Folder of the images.
        masks: Folder of the masks.
        endings: Required ends of the stems of images and masks, removed from the names, e.g. ``"_leftImg8bit"``.
        nested: Read the sub-folders instead of the folders themselves.
        split: What a missing folder means, e.g. ``"split 'val' of ADE20K"``; by default it is an error.

    Raises:
        AbsentSplitError: A folder is missing and ``split`` is given.
        DataError: There is no image, an image has no mask, or a mask has no image.
    """
    for folder in (images, masks):
        if split and not folder.is_dir():
            raise AbsentSplitError(f"{split} is absent: {folder} does not exist", "unpack that part too")
    files = _index(images, IMAGE_SUFFIXES, endings[0], nested), _index(masks, MASK_SUFFIXES, endings[1], nested)
    for these, those, what, lacks in ((*files, "image", "mask"), (*files[::-1], "mask", "image")):
        alone = [these[name] for name in these if name not in those]
        if alone:
            more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
            raise DataError(f"{what} without {lacks}: {alone[0]}{more}", f"add the {lacks} or remove the {what}")
    if not files[0]:
        raise DataError(f"{images} holds no images", f"expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    return {name: Pair(files[0][name], files[1][name]) for name in sorted(files[0])}


def list_pairs(
    path: Path, locate: Callable[[Sequence[str]], tuple[Path, Path]], columns: int = 2, split: str = ""
) -> dict[str, Pair]:
    """Find the files of every line of an image list, in list order. A sample's name is its image's stem.

    Blank lines are skipped. Each folder is read once, so that long lists need no file-system call per line.

    Args:
        path: The list.
        locate: Expected paths of the image and the mask of a line, given its columns; their suffix is not used.
        columns: 2 for one or two white-space separated entries per line; 1 for one entry that may contain spaces.
        split: What a missing list means, e.g. ``"split 'val' of CamVid"``; by default it is an error.

    Raises:
        AbsentSplitError: The list is missing and ``split`` is given.
        DataError: The list is not text or is empty, a line has too many entries, a sample is listed twice, or a file is
            missing (the message names the first and counts the others).
    """
    if split and not path.is_file():
        raise AbsentSplitError(f"{split} is absent: {path} does not exist", "add the list")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the image list {path} cannot be read: {error}", "a list is a text file with one sample per line"
        ) from error
    folders: dict[tuple[Path, bool], dict[str, Path]] = {}
    pairs: dict[str, Pair] = {}
    missing: list[tuple[int, str, Path]] = []
    for number, line in enumerate(lines, 1):
        entries = line.split() if columns > 1 else [line.strip()]
        if not any(entries):
            continue
        if len(entries) > columns:
            raise DataError(
                f"{path} line {number} has {len(entries)} entries", "expected a name, or an image path and a mask path"
            )
        found: list[Path] = []
        for what, file in zip(("image", "mask"), locate(entries), strict=True):
            key = file.parent, what == "mask"
            if key not in folders:
                folders[key] = _index(file.parent, MASK_SUFFIXES if what == "mask" else IMAGE_SUFFIXES)
            there = folders[key].get(file.stem)
            if there is None and Path(file.stem).suffix.lower() in IMAGE_SUFFIXES:
                there = folders[key].get(Path(file.stem).stem)  # the list has file names instead of sample names
            if there is None:
                missing.append((number, what, file))
                break
            found.append(there)
        else:
            if found[0].stem in pairs:
                raise DataError(f"{path} line {number} lists '{found[0].stem}' a second time", "remove the line")
            pairs[found[0].stem] = Pair(*found)
    if missing:
        number, what, file = missing[0]
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(f"{path} line {number} names a missing {what}: {file}{more}", "add the file or remove the line")
    if not pairs:
        raise DataError(f"the image list {path} is empty", "write one sample name per line")
    return pairs


def _index(folder: Path, suffixes: tuple[str, ...], ending: str = "", nested: bool = False) -> dict[str, Path]:
    """File by sample name for a folder, sorted by name, without hidden files.

    Raises DataError if the folder is missing, or if two of its files differ only in their suffix.
    """
    found: dict[str, Path] = {}
    try:
        folders = sorted(path for path in folder.iterdir() if path.is_dir()) if nested else [folder]
        files = [file for place in folders for file in sorted(place.iterdir())]
    except OSError as error:
        raise DataError(
            f"the folder {folder} cannot be read: {error.strerror}", "check the data set's layout"
        ) from error
    for file in files:
        if file.name.startswith(".") or file.suffix.lower() not in suffixes or not file.stem.endswith(ending):
            continue
        name = file.stem.removesuffix(ending)
        if name in found:
            raise DataError(
                f"{folder} holds both {found[name].name} and {file.name}", "a sample has one file: remove one of them"
            )
        found[name] = file
    return found
