"""Images sorted into one folder per class.

::

    ROOT/{train,val,test}/CLASS/*.png    (or .jpg, .tif, ...)
    ROOT/classes.txt                     optional: the folders' names in learning order, one per line
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import numpy as np

from perdure.data.readers.imagefiles import IMAGE_SUFFIXES, read_image, to_grey
from perdure.data.source import AbsentSplitError, Image, Kind, Mask, Source, Split
from perdure.errors import DataError, nearest
from perdure.labels import IGNORE, LabelSpace, label_space

CLASS_LIST: Final = "classes.txt"
_LAYOUT: Final = "expected train/CLASS/*.png, test/CLASS/*.png and perhaps val/CLASS/*.png, one folder per class"


@dataclass(frozen=True, eq=False)
class ClassFolders(Source):
    """Images whose folder is their class; implements :class:`~perdure.data.source.Source`.

    Args:
        root: Folder that holds the splits' folders.
        space: The classes; a class has the name of its folder.
        channels: 3 for RGB images, 1 for grey ones.
        patients: See :class:`~perdure.data.source.Source`.
    """

    root: Path
    space: LabelSpace
    channels: Literal[1, 3] = 3
    patients: bool = False
    name: str = field(default="class_folders", init=False)
    kind: Kind = field(default="classification", init=False)
    other_label: int = field(default=0, init=False)
    _listed: dict[Split, Mapping[str, int]] = field(default_factory=dict, init=False, repr=False)

    def names(self, split: Split) -> Sequence[str]:
        """``CLASS/FILE`` with the file's suffix, sorted by class in the order of the class list."""
        return tuple(self._samples(split))

    def image(self, split: Split, name: str) -> Image:
        """Image ``(channels, H, W)`` uint8."""
        self._class_of(split, name)
        pixels = read_image(self.root / split / name)
        return pixels if self.channels == 3 else to_grey(pixels)

    def file_of(self, split: Split, name: str) -> Path:
        """The image file."""
        return self.root / split / name

    def mask(self, split: Split, name: str) -> Mask:
        """Class id of an image, shape ``()``; no file is read."""
        return np.asarray(self._class_of(split, name), np.int16)

    def fingerprint(self, split: Split) -> str:
        """Digest of the names and classes of all images."""
        # no pixels are read: image lists depend on names and classes only
        digest = hashlib.blake2b(digest_size=16)
        for name, class_id in self._samples(split).items():
            digest.update(f"{class_id}\0{name}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def _samples(self, split: Split) -> Mapping[str, int]:
        """Class id by sample name."""
        if split not in self._listed:
            self._listed[split] = _list_images(self.root / split, split, self.space)
        return self._listed[split]

    def _class_of(self, split: Split, name: str) -> int:
        try:
            return self._samples(split)[name]
        except KeyError:
            raise DataError(f"{self.name} has no sample '{name}' in split '{split}'") from None


def open_class_folders(root: Path, channels: Literal[1, 3] = 3, patients: bool = False) -> ClassFolders:
    """Open images in one folder per class. The classes are the folders of ``train``, sorted or as in ``classes.txt``.

    Args:
        root: The folder that holds ``train``, ``test`` and perhaps ``val``.
        channels: 3 reads images as RGB, 1 as grey.
        patients: True if the images come from patients: a run then stores no picture of them.

    Raises:
        DataError: The folder has another layout, a class folder has no image, or ``classes.txt`` does not match.
    """
    if not (root / "train").is_dir():
        there = sorted(path.name for path in _visible(root) if path.is_dir())
        raise DataError(f"{root} has no folder train (folders: {', '.join(there[:6]) or 'none'})", _LAYOUT)
    folders = [path.name for path in _visible(root / "train") if path.is_dir()]
    if not folders:
        raise DataError(f"{root / 'train'} has no class folder", _LAYOUT)
    listed = root / CLASS_LIST
    names = _in_order(listed, folders) if listed.is_file() else folders
    if len(names) >= IGNORE:
        raise DataError(f"{root / 'train'} has {len(names)} class folders", f"{IGNORE - 1} classes at most")
    source = ClassFolders(root, label_space(names, background=None), channels, patients)
    present = {name.split("/", 1)[0] for name in source.names("train")}
    empty = [name for name in names if name not in present]
    if empty:
        raise DataError(
            f"{root / 'train' / empty[0]} holds no image", f"add images ({', '.join(IMAGE_SUFFIXES)}) or remove it"
        )
    return source


def _visible(folder: Path) -> Iterator[Path]:
    """Content of a folder in name order, without hidden files and folders."""
    try:
        yield from sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be read: {error.strerror}", _LAYOUT) from error


def _in_order(path: Path, folders: Sequence[str]) -> list[str]:
    """Lines of the class list, which must be the folders' names in some order."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}", "write one class folder's name per line") from error
    names = [line for line in lines if line and not line.startswith("#")]
    for name in names:
        if name not in folders:
            raise DataError(f"{path} names '{name}', but train has no such folder", nearest(name, folders))
        if names.count(name) > 1:
            raise DataError(f"{path} names '{name}' twice", "name each class once")
    missing = [name for name in folders if name not in names]
    if missing:
        raise DataError(f"{path} lacks the folder train/{missing[0]}", "name every class folder, one per line")
    return names


def _list_images(folder: Path, split: Split, space: LabelSpace) -> dict[str, int]:
    """Class id by ``CLASS/FILE`` of a split."""
    if not folder.is_dir():
        raise AbsentSplitError(f"split '{split}' is absent: {folder} does not exist", f"add {split}/CLASS/ folders")
    ids = {c.name: c.id for c in space.classes}
    samples: dict[str, int] = {}
    for place in _visible(folder):
        if not place.is_dir():
            if place.suffix.lower() in IMAGE_SUFFIXES:
                raise DataError(f"{place} lies beside the class folders", "move it into the folder of its class")
        elif place.name not in ids:
            raise DataError(
                f"{place} is a class that train lacks", f"remove the folder or rename it: {nearest(place.name, ids)}"
            )
    for name, class_id in ids.items():
        for path in _visible(folder / name) if (folder / name).is_dir() else ():
            if path.is_dir():
                raise DataError(
                    f"{path} is a folder inside a class folder", "put the images directly into the class folder"
                )
            if path.suffix.lower() in IMAGE_SUFFIXES:
                samples[f"{name}/{path.name}"] = class_id
    if not samples:
        raise DataError(f"{folder} holds no image", _LAYOUT)
    return samples
