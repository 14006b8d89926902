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
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from perdure.data.readers.imagefiles import IMAGE_SUFFIXES, MASK_SUFFIXES, read_image, read_index_mask, sample_name
from perdure.data.source import AbsentSplitError, Image, Kind, Labels, Mask, Source, Split, UnknownLabelError, distinct
from perdure.errors import DataError
from perdure.files import refuse_special
from perdure.labels import BACKGROUND, IGNORE, IGNORE_IN_FILES, LabelSpace

UNKNOWN = -1
_PICTURES: Final = frozenset((*IMAGE_SUFFIXES, ".gif", ".heic", ".jp2", ".npy", ".ppm", ".pgm", ".tga", ".dcm"))
"""Suffixes of files that somebody may have meant as an image or a mask."""
Decoder = npt.NDArray[np.int16]
"""Table ``(65536,)``: number in a mask file -> global id, or -1 for numbers without a meaning."""


class Pair(NamedTuple):
    """The two files of a sample."""

    image: Path
    mask: Path


class PairingError(DataError):
    """Files of a split do not belong together in pairs.

    Args:
        what: See :class:`~perdure.errors.PerdureError`.
        hint: See :class:`~perdure.errors.PerdureError`.
        problems: All that is wrong.
        pairs: The samples with which nothing is wrong.
    """

    def __init__(
        self, what: str, hint: str = "", problems: Sequence[DataError] = (), pairs: Mapping[str, Pair] | None = None
    ) -> None:
        super().__init__(what, hint)
        self.problems = tuple(problems)
        self.pairs = dict(pairs or {})

    @classmethod
    def of(cls, problems: Sequence[DataError], pairs: Mapping[str, Pair]) -> PairingError:
        """Names the first problem and counts the others."""
        others = f" (and {len(problems) - 1} more: `perdure check` names them)" if len(problems) > 1 else ""
        return cls(f"{problems[0].what}{others}", problems[0].hint, problems, pairs)


class _Indexed(NamedTuple):
    """Content of a folder by sample name: files, pictures of other formats, and names that two files have."""

    files: dict[str, Path]
    others: dict[str, Path]
    twice: dict[str, DataError]


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
        remedy: Hint of the error for a number that ``decode`` does not list; the number replaces ``LABEL`` in it.
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
    _sound: dict[Split, Mapping[str, Pair]] = field(default_factory=dict, init=False, repr=False)

    def pairs(self, split: Split) -> Mapping[str, Pair]:
        """Files of every sample of a split, in order. Raises DataError if list and files do not match."""
        if split not in self._listed:
            self._listed[split] = self.lister(split)
        return self._listed[split]

    def names(self, split: Split) -> Sequence[str]:
        """Sample names in the order of the list, or sorted if the layout has no list."""
        return tuple(self.pairs(split))

    def listing(self, split: Split) -> tuple[Sequence[str], Sequence[DataError]]:
        """Samples with an image and a mask, and every file without the other."""
        try:
            return self.names(split), ()
        except PairingError as error:
            self._sound[split] = error.pairs  # apart from the list, which goes on to be an error for everybody else
            return tuple(error.pairs), error.problems

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
            raise UnknownLabelError(
                f"{path} has label {raw[row, column]} (row {row}, column {column}; {np.count_nonzero(ids < 0)} pixels "
                f"are outside the class list)",
                self.remedy.replace("LABEL", str(raw[row, column])),
                tuple(map(int, np.unique(raw[ids < 0]))),
            )
        return ids

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
            refuse_special(pair.mask)
            try:
                return hashlib.blake2b(pair.mask.read_bytes(), digest_size=16).digest()
            except OSError as error:
                raise DataError(f"{pair.mask} cannot be read: {error.strerror}", "restore the file") from error

        with ThreadPoolExecutor() as pool:  # reading and hashing release the GIL
            for name, part in zip(pairs, pool.map(content, pairs.values()), strict=True):
                digest.update(name.encode() + b"\0" + part)
        return digest.hexdigest()

    def files(self, split: Split, name: str) -> Sequence[Path]:
        """Image and mask."""
        return self._pair(split, name)

    def reading(self) -> bytes:
        """Also the meaning of the numbers in masks."""
        return super().reading() + self.decode.tobytes()

    def _pair(self, split: Split, name: str) -> Pair:
        try:
            return (self._sound.get(split) or self.pairs(split))[name]
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
        DataError: There is no image.
        PairingError: An image has no mask, a mask has no image, or two files have one name.
    """
    for folder in (images, masks):
        if split and not folder.is_dir():
            raise AbsentSplitError(f"{split} is absent: {folder} does not exist", "unpack that part too")
    found = _index(images, IMAGE_SUFFIXES, endings[0], nested), _index(masks, MASK_SUFFIXES, endings[1], nested)
    ambiguous = {**found[0].twice, **found[1].twice}
    problems = [*found[0].twice.values(), *found[1].twice.values()]
    for these, those, what, lacks in ((*found, "image", "mask"), (*found[::-1], "mask", "image")):
        for name in these.files:
            if name in those.files or name in ambiguous:
                continue
            wrong = _wrong_format(those, name, lacks)
            problems.append(
                wrong
                or DataError(f"{what} without {lacks}: {these.files[name]}", f"add the {lacks} or remove the {what}")
            )
    files = found[0].files, found[1].files
    pairs = {name: Pair(files[0][name], files[1][name]) for name in sorted(files[0]) if name in files[1]}
    pairs = {name: pair for name, pair in pairs.items() if name not in ambiguous}
    if problems:
        raise PairingError.of(problems, pairs)
    if not pairs:
        raise DataError(f"{images} holds no images", f"expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    return pairs


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
        DataError: The list is not text or is empty, or a line has too many entries.
        PairingError: A sample is listed twice, a file is missing, or two files have one name.
    """
    if split and not path.is_file():
        raise AbsentSplitError(f"{split} is absent: {path} does not exist", "add the list")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the image list {path} cannot be read: {error}", "a list is a text file with one sample per line"
        ) from error
    folders: dict[tuple[Path, bool], _Indexed] = {}
    pairs: dict[str, Pair] = {}
    problems: list[DataError] = []
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
            name = file.stem
            if name not in folders[key].files and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                name = Path(name).stem  # the list has file names instead of sample names
            if name in folders[key].twice:
                problems.append(folders[key].twice[name])
                break
            if name not in folders[key].files:
                wrong = _wrong_format(folders[key], name, what)
                gone = DataError(
                    f"{path} line {number} names a missing {what}: {file}", "add the file or remove the line"
                )
                problems.append(wrong or gone)
                break
            found.append(folders[key].files[name])
        else:
            if found[0].stem in pairs:
                what = f"{path} line {number} lists '{found[0].stem}' a second time"
                problems.append(DataError(what, "remove the line"))
            pairs[found[0].stem] = Pair(*found)
    if problems:
        raise PairingError.of(problems, pairs)
    if not pairs:
        raise DataError(f"the image list {path} is empty", "write one sample name per line")
    return pairs


def _wrong_format(folder: _Indexed, name: str, what: str) -> DataError | None:
    """The error of an image or a mask that is there in a format which is not read; None without one."""
    if (file := folder.others.get(name)) is None:
        return None
    formats = "PNG, BMP or TIFF" if what == "mask" else "JPEG, PNG, BMP, TIFF or WebP"
    kind = file.suffix[1:].upper().replace("JPG", "JPEG")
    return DataError(
        f"{file} is a {kind}; {what}s must be {formats}",
        # a converted JPEG keeps the numbers in between that its compression has made
        "export it again from the labelling tool, as PNG" if what == "mask" else "save it in one of these formats",
    )


def _index(folder: Path, suffixes: tuple[str, ...], ending: str = "", nested: bool = False) -> _Indexed:
    """Files by sample name for a folder, sorted by name, without hidden files. Raises DataError if it is missing."""
    found = _Indexed({}, {}, {})
    try:
        folders = sorted(path for path in folder.iterdir() if path.is_dir()) if nested else [folder]
        files = [file for place in folders for file in sorted(place.iterdir())]
    except OSError as error:
        raise DataError(
            f"the folder {folder} cannot be read: {error.strerror}", "check the data set's layout"
        ) from error
    for file in files:
        if file.name.startswith(".") or not file.stem.endswith(ending):
            continue
        if file.suffix.lower() not in suffixes:
            if file.suffix.lower() in _PICTURES:
                found.others.setdefault(file.stem.removesuffix(ending), file)
            continue
        name = sample_name(file, file.stem.removesuffix(ending))
        if name in found.files:
            found.twice[name] = DataError(
                f"{folder} holds both {found.files[name].name} and {file.name}",
                "a sample has one file: remove one of them",
            )
        found.files.setdefault(name, file)
    return found
