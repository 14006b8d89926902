"""PASCAL VOC 2012, and other data sets in its layout with a class file of their own.

Layout: ``JPEGImages/NAME.jpg``, ``SegmentationClass/NAME.png`` (palette PNG, 255 = boundary or ignore) and
``ImageSets/Segmentation/{train,val}.txt``. With the augmented annotations (Hariharan et al. 2011) there are also
``SegmentationClassAug/`` and ``train_aug.txt``, whose lines are names or ``/JPEGImages/x.jpg
/SegmentationClassAug/x.png``.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from perdure.data.readers.classfile import find_class_file, read_class_file
from perdure.data.readers.listing import Line, Pair, from_list, read_list
from perdure.data.readers.pairs import PairSource, identity
from perdure.data.source import AbsentSplitError, Split
from perdure.errors import DataError
from perdure.labels import ClassInfo, Color, LabelSpace

CLASSES: Final = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def voc_color(index: int) -> Color:
    """Colour of a class in the palette of the development kit: bits of the index spread over R, G and B."""
    bits = np.arange(8)
    channels = [int((((index >> (3 * bits + c)) & 1) << (7 - bits)).sum()) for c in range(3)]
    return channels[0], channels[1], channels[2]


def voc_space() -> LabelSpace:
    """The 20 classes in official order and colours."""
    return LabelSpace(tuple(ClassInfo(k, name, "thing", voc_color(k)) for k, name in enumerate(CLASSES, 1)))


def open_voc(root: Path, train_list: str | None = None, val_list: str = "val") -> PairSource:
    """Open VOC 2012 or another data set in its layout.

    Train is ``train_aug.txt`` if that list exists, else ``train.txt``. Val is the official val list with
    ``SegmentationClass``. Test is the same as val for VOC itself (its test masks are not public). A data set with its
    own class file may have a ``test.txt``.

    Args:
        root: The folder that holds ``VOCdevkit/VOC2012``, ``VOCdevkit``, or ``VOC2012`` itself.
        train_list: Name of the list for train, e.g. ``"train"`` instead of the augmented list.
        val_list: Name of the list for val.

    Raises:
        DataError: The folder has another layout, or the class file is invalid.
    """
    base = _base(root)
    own = _own_classes(base)
    space = own or voc_space()
    remedy = (
        "add the class to the class file, or correct the mask"
        if own
        else "VOC masks hold 0..20 and 255; a data set with other classes needs a classes.txt beside JPEGImages"
    )
    lister = partial(_samples, base, train_list, val_list, own is not None)
    return PairSource("voc", space, lister, identity(space), remedy)


def _base(root: Path) -> Path:
    candidates = (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012")
    for base in candidates:
        if (base / "JPEGImages").is_dir() and (base / "ImageSets" / "Segmentation").is_dir():
            return base
    raise DataError(
        f"{root} is not a data set in the VOC layout",
        "expected JPEGImages/, SegmentationClass/, ImageSets/Segmentation/ in it or in VOCdevkit/VOC2012/",
    )


def _own_classes(base: Path) -> LabelSpace | None:
    """Label space of the folder's class file, or None if there is none or it lists VOC's own classes."""
    path = find_class_file(base)
    if path is None:
        return None
    space = read_class_file(path)
    plain = tuple(re.sub(r"[\W_]", "", c.name).lower() for c in space.classes)
    return None if plain == CLASSES and space.ids == tuple(range(1, 21)) else space


def _samples(base: Path, train_list: str | None, val_list: str, own: bool, split: Split) -> dict[str, Pair]:
    lists = base / "ImageSets" / "Segmentation"
    if split == "train":
        stem = train_list or ("train_aug" if (lists / "train_aug.txt").is_file() else "train")
    else:
        stem = "test" if split == "test" and own and (lists / "test.txt").is_file() else val_list
    path = lists / f"{stem}.txt"
    if not path.is_file():
        raise AbsentSplitError(f"split '{split}' of {base} has no list: {path} does not exist", "add the list")
    augmented = stem.endswith("_aug") and (base / "SegmentationClassAug").is_dir()
    masks = base / ("SegmentationClassAug" if augmented else "SegmentationClass")
    return from_list(path, read_list(path), partial(_locate, base, masks))


def _locate(base: Path, masks: Path, line: Line) -> tuple[Path, Path]:
    if len(line.columns) == 2:
        image, mask = (base / column.lstrip("/") for column in line.columns)
        return image, mask
    return base / "JPEGImages" / f"{line.columns[0]}.jpg", masks / f"{line.columns[0]}.png"
