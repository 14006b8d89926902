"""MedMNIST's 2D sets, and other ``.npz`` files in their layout: small images with one class per image.

Such a file is a zip archive of NumPy arrays, read without pickle; every defect of it is a DataError.

A file holds ``{train,val,test}_images``, ``(N, H, W)`` or ``(N, H, W, 3)`` uint8, and ``{train,val,test}_labels``,
``(N,)`` or ``(N, 1)`` from 0. ``tables/medmnist.json`` describes the official files.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from perdure.data.readers.medmnist_official import (
    OfficialSet,
    difference,
    download_official,
    file_name,
    official_sets,
)
from perdure.data.source import SPLITS, AbsentSplitError, Image, Kind, Mask, Source, Split
from perdure.errors import DataError, UsageError, nearest
from perdure.labels import IGNORE, LabelSpace, label_space

Size = Literal[28, 64, 128, 224]
Verify = Literal["warn", "strict", "off"]
Pixels = npt.NDArray[np.uint8]
_LOADING = threading.Lock()  # several threads must not load the same images twice
_log = logging.getLogger(__name__)
_UNREADABLE: Final = (
    OSError, EOFError, ValueError, KeyError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip  # what zipfile and NumPy raise on damaged, encrypted and foreign archives


class Header(NamedTuple):
    """Shape, type and checksum (CRC-32 of its bytes) of an array, known before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    crc: int


def read_headers(path: Path) -> dict[str, Header]:
    """Header of every array of an archive; no array is read.

    Raises:
        DataError: The file is missing, damaged, or not an archive of arrays.
    """
    headers: dict[str, Header] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.filename.endswith(".npy"):
                    continue
                with archive.open(info) as stream:
                    version = np.lib.format.read_magic(stream)
                    if version not in ((1, 0), (2, 0)):
                        raise ValueError(f"array '{info.filename}' has format version {version}")
                    old = version == (1, 0)
                    read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
                    shape, _, dtype = read(stream)
                    # Python's integers: the shape of a damaged header can overflow those of NumPy
                    size = stream.tell() + int(np.prod(shape, dtype=object)) * dtype.itemsize
                if not dtype.hasobject and size != info.file_size:
                    raise ValueError(f"array '{info.filename}' should have {size} bytes and has {info.file_size}")
                headers[info.filename.removesuffix(".npy")] = Header(shape, dtype, info.CRC)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    if not headers:
        raise DataError(f"{path} holds no NumPy array", "expected an archive written by numpy.savez")
    return headers


def read_array(path: Path, key: str) -> npt.NDArray[np.generic]:
    """Read one array. Pickled objects are refused.

    Raises:
        DataError: The array is missing, damaged, contains Python objects, or does not fit into memory.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            array: npt.NDArray[np.generic] = archive[key]
    except MemoryError as error:
        raise DataError(f"'{key}' in {path} does not fit into memory", "choose a smaller image size") from error
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    return array


def _unreadable(path: Path, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path} does not exist")
    why = (str(error) or type(error).__name__).splitlines()[0]
    return DataError(
        f"{path} is not a readable .npz file: {why}", "the file is damaged or of another type: download it again"
    )


@dataclass(frozen=True, eq=False)
class NpzImages(Source):
    """Images with one class per image from an ``.npz`` file; implements :class:`~perdure.data.source.Source`.

    Labels are loaded at once, the images of a split when the first of them is read.

    Args:
        name: Short name of the data set.
        path: The file.
        space: Its classes; id k + 1 is label k of the file.
        headers: Shape, type and checksum of the file's arrays.
        ids: Class id of every image by split, without splits that the file lacks.
        patients: See :class:`~perdure.data.source.Source`.
    """

    name: str
    path: Path
    space: LabelSpace
    headers: Mapping[str, Header]
    ids: Mapping[Split, Mask]
    patients: bool
    kind: Kind = field(default="classification", init=False)
    other_label: int = field(default=0, init=False)
    _loaded: dict[Split, Pixels | DataError] = field(default_factory=dict, init=False, repr=False)

    def names(self, split: Split) -> Sequence[str]:
        """Positions in the file, with five digits or more: ``00000``, ``00001``, ..."""
        count = len(self._ids(split))
        width = max(5, len(str(count - 1)))
        return tuple(f"{k:0{width}d}" for k in range(count))

    def image(self, split: Split, name: str) -> Image:
        """Image ``(C, H, W)`` uint8; C is 1 or 3."""
        pixels = self._images(split)[self._row(split, name)]
        return pixels[None].copy() if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def mask(self, split: Split, name: str) -> Mask:
        """Class id of an image, shape ``()``."""
        return np.asarray(self._ids(split)[self._row(split, name)])

    def fingerprint(self, split: Split) -> str:
        """Digest of classes, labels, shape and the file's checksum of the images."""
        ids, images = self._ids(split), self.headers[f"{split}_images"]
        digest = hashlib.blake2b(ids.tobytes(), digest_size=16)
        # the archive's own checksum spares reading the images, which can be gigabytes
        digest.update(repr((self.space.ids, [c.name for c in self.space.classes], images.shape, images.crc)).encode())
        return digest.hexdigest()

    def files(self, split: Split, name: str) -> Sequence[Path]:  # noqa: ARG002
        """The one file of all samples."""
        return (self.path,)

    def _ids(self, split: Split) -> Mask:
        if split not in self.ids:
            raise AbsentSplitError(f"split '{split}' is absent: {self.path} has no {split}_images", "add the arrays")
        return self.ids[split]

    def _row(self, split: Split, name: str) -> int:
        count = len(self._ids(split))
        if not (name.isdecimal() and len(name) == max(5, len(str(count - 1))) and int(name) < count):
            raise DataError(f"{self.name} has no sample '{name}' in split '{split}'")
        return int(name)

    def _images(self, split: Split) -> Pixels:
        if split not in self._loaded:  # asked before the lock too, which most reads then never wait for
            with _LOADING:
                if split not in self._loaded:
                    try:
                        self._loaded[split] = read_array(self.path, f"{split}_images").astype(np.uint8, copy=False)
                    except DataError as error:
                        self._loaded[split] = error  # a damaged file is not read again for each of its images
        known = self._loaded[split]
        if isinstance(known, DataError):
            raise known
        return known

    def __getstate__(self) -> dict[str, object]:
        """Leave the loaded images out when the source is sent to another process."""
        return self.__dict__ | {"_loaded": {}}


def open_medmnist(
    root: Path,
    flag: str | None = None,
    size: Size = 28,
    file: str | None = None,
    classes: Sequence[str] | None = None,
    download: bool = False,
    verify: Verify = "warn",
    patients: bool = True,
) -> NpzImages:
    """Open a MedMNIST set by its flag, or another ``.npz`` file in the same layout by its name.

    The images of a split are held in memory while it is used: up to 0.2 GB at size 28, 13.5 GB for PathMNIST at 224.

    Args:
        root: The folder that holds the file.
        flag: Which official set: ``bloodmnist``, ``pathmnist``, ... Its file is ``FLAG.npz``, or ``FLAG_64.npz`` and
            so on for larger images. Not ``chestmnist``: its images have several classes each.
        size: Height and width of the official set's images: 28, 64, 128 or 224.
        file: Name of a file in ``root`` where it is no official set or has another name.
        classes: Class names in the order of the labels, for a file without ``flag``; ``class 0``, ``class 1``, ...
            if not given.
        download: Download the official file into ``root`` if it is missing, with the package medmnist.
        verify: What to do if the file with a ``flag`` is not the official one (MD5): ``warn`` logs the differences and
            continues, ``strict`` refuses it, ``off`` does not check.
        patients: False for images that may be shown; otherwise a run stores no picture of them.

    Raises:
        UsageError: Neither ``flag`` nor ``file`` is given, the flag is unknown, or options exclude each other.
        DataError: The file is missing or damaged, has another layout, several labels per image, or labels outside
            the class list; it is not the official one and ``verify`` is ``strict``; it could not be downloaded.
    """
    facts = _facts(root, flag, file, classes, download)
    path = root / (file or file_name(str(flag), size))
    if download and flag is not None and not path.exists():
        download_official(flag, size, path)
    if not path.is_file():
        raise DataError(f"{path} does not exist", _found(root))
    headers = read_headers(path)
    splits = _splits(path, headers)
    labels = {split: _labels(path, f"{split}_labels", headers[f"{split}_images"].shape[0]) for split in splits}
    names = facts.classes if facts else classes
    if not names:  # as many as the labels ask for
        names = [f"class {k}" for k in range(min(IGNORE - 1, 1 + max(int(values.max()) for values in labels.values())))]
    for split, values in labels.items():
        wrong = np.flatnonzero((values < 0) | (values >= len(names)))
        if wrong.size:
            raise DataError(
                f"{split}_labels in {path} holds {values[wrong[0]]} (image {wrong[0]}; {wrong.size} labels are outside "
                f"0 to {len(names) - 1})",
                f"the file is damaged or has other classes: {len(names)} are expected",
            )
    if facts and verify != "off":
        what = difference(path, facts, size, {key: header.shape for key, header in headers.items()})
        if what and verify == "strict":
            raise DataError(what, "fetch the official file, or accept this one with verify=warn")
        if what:
            _log.warning("%s", what)
    space = label_space(names, facts.kind if facts else "thing", background=None)
    ids = {split: (values + 1).astype(np.int16) for split, values in labels.items()}
    return NpzImages(flag or path.stem, path, space, headers, ids, patients)


def _facts(
    root: Path, flag: str | None, file: str | None, classes: Sequence[str] | None, download: bool
) -> OfficialSet | None:
    """Description of the official set, or None for a file of the user."""
    if flag is None:
        if file is None:
            raise UsageError("medmnist: which set is wanted?", f"give flag=bloodmnist or file=NAME.npz; {_found(root)}")
        if download:
            raise UsageError("medmnist: download needs a flag", "only official sets can be downloaded")
        if classes is not None and not 0 < len(classes) < IGNORE:
            raise UsageError(f"medmnist: {len(classes)} classes are given", f"give 1 to {IGNORE - 1}")
        return None
    if flag not in official_sets():
        hint = "only the 2D sets are read" if flag.endswith("3d") else nearest(flag, official_sets())
        raise UsageError(f"medmnist: unknown flag '{flag}'", hint)
    if classes is not None:
        raise UsageError(f"medmnist: the classes of '{flag}' are known", "leave classes out, or give file without flag")
    if file is not None and download:
        raise UsageError("medmnist: download and file exclude each other", "give only one of them")
    facts = official_sets()[flag]
    if facts.multilabel:
        raise UsageError(
            f"medmnist: '{flag}' marks any number of its {len(facts.classes)} findings in an image",
            "one class per image is needed: choose another set",
        )
    return facts


def _found(root: Path) -> str:
    there = sorted(path.name for path in root.glob("*.npz"))
    more = f" and {len(there) - 6} more" if len(there) > 6 else ""
    return (
        f"{root} holds {', '.join(there[:6])}{more}" if there else f"{root} holds no .npz file; download=true fetches"
    )


def _splits(path: Path, headers: Mapping[str, Header]) -> tuple[Split, ...]:
    """Splits of the file. Raises DataError for arrays that are not images and labels."""
    found = tuple(split for split in SPLITS if f"{split}_images" in headers or f"{split}_labels" in headers)
    if "train" not in found:
        raise DataError(
            f"{path} is not in MedMNIST's layout: it holds {', '.join(sorted(headers)[:6])}",
            "expected train_images, train_labels, val_images, val_labels, test_images, test_labels",
        )
    channels: dict[int, str] = {}
    for split in found:
        for key in (f"{split}_images", f"{split}_labels"):
            if key not in headers:
                raise DataError(f"{path} has no {key}", "images and labels of a split belong together")
        key, header = f"{split}_images", headers[f"{split}_images"]
        if header.dtype != np.uint8:
            raise DataError(f"{key} in {path} has type {header.dtype}", "images must be uint8, 0 to 255")
        if len(header.shape) not in (3, 4) or header.shape[3:] not in ((), (1,), (3,)) or 0 in header.shape:
            what = "N × H × W or N × H × W × 3 is expected (volumes are not read)"
            raise DataError(f"{key} in {path} has shape {'×'.join(map(str, header.shape))}", what)
        channels[header.shape[3] if len(header.shape) == 4 else 1] = key
    if len(channels) > 1:
        raise DataError(f"{path} has grey images ({channels[1]}) and colour images ({channels[3]})", "use one kind")
    return found


def _labels(path: Path, key: str, images: int) -> npt.NDArray[np.int64]:
    """Labels ``(N,)`` as stored in the file."""
    values = read_array(path, key)
    if values.ndim == 2 and values.shape[1] > 1:
        raise DataError(f"{key} in {path} has {values.shape[1]} labels per image", "one class per image is needed")
    if values.ndim not in (1, 2) or not np.issubdtype(values.dtype, np.integer):
        shape = "×".join(map(str, values.shape)) or "none"
        raise DataError(f"{key} in {path} has type {values.dtype} and shape {shape}", "expected N whole numbers")
    if values.size != images:
        raise DataError(f"{path} has {images} images but {values.size} labels in {key}", "fetch or write it again")
    return values.reshape(-1).astype(np.int64)
