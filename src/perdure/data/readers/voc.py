"""PASCAL VOC 2012, and other data sets in its layout with a class file of their own.

Layout: ``JPEGImages/NAME.jpg``, ``SegmentationClass/NAME.png`` (palette PNG, 255 = boundary or ignore) and
``ImageSets/Segmentation/{train,val}.txt``. With the augmented annotations (Hariharan et al. 2011) there are also
``SegmentationClassAug/`` and ``train_aug.txt``, whose lines are names or ``/JPEGImages/x.jpg
/SegmentationClassAug/x.png``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from perdure.data.readers.classfile import find_class_file, read_class_file
from perdure.data.readers.pairs import Pair, PairSource, identity, list_pairs
from perdure.data.source import Split, no_validation
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


def open_voc(root: Path, train_list: str | None = None, val_list: str = "val") -> PairSource:
    """Open VOC 2012 or another data set in its layout.

    Train is ``train_aug.txt`` if that list exists, else ``train.txt``. Test is the official val list with
    ``SegmentationClass``, as published (the masks of VOC's test list are not public); there is no validation set then.
    A data set with its own class file that has a ``test.txt`` is tested on that, and val is its validation set.

    Args:
        root: The folder that holds ``VOCdevkit/VOC2012``, ``VOCdevkit``, or ``VOC2012`` itself.
        train_list: Name of the list for train, e.g. ``"train"`` instead of the augmented list.
        val_list: Name of the val list.

    Raises:
        DataError: The folder has another layout, or the class file is invalid.
    """
    for base in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (base / "JPEGImages").is_dir() and (base / "ImageSets" / "Segmentation").is_dir():
            break
    else:
        raise DataError(
            f"{root} is not a data set in the VOC layout",
            "expected JPEGImages/, SegmentationClass/, ImageSets/Segmentation/ in it or in VOCdevkit/VOC2012/",
        )
    space = LabelSpace(tuple(ClassInfo(k, name, "thing", voc_color(k)) for k, name in enumerate(CLASSES, 1)))
    own = False
    remedy = "VOC masks hold 0..20 and 255; a data set with other classes needs a classes.txt beside JPEGImages"
    if path := find_class_file(base):
        listed = read_class_file(path)
        plain = tuple(re.sub(r"[\W_]", "", c.name).lower() for c in listed.classes)
        # a file with VOC's own classes changes nothing, so that colours and splits stay the official ones
        if plain != CLASSES or listed.ids != space.ids:
            space, own, remedy = listed, True, "add the class to the class file, or correct the mask"
    return PairSource("voc", space, partial(_samples, base, train_list, val_list, own), identity(space), remedy)


def _samples(base: Path, train_list: str | None, val_list: str, own: bool, split: Split) -> dict[str, Pair]:
    lists = base / "ImageSets" / "Segmentation"
    if split == "train":
        stem = train_list or ("train_aug" if (lists / "train_aug.txt").is_file() else "train")
    else:
        tested = own and (lists / "test.txt").is_file()
        if split == "val" and not tested:
            raise no_validation(str(base), f"the images of {val_list}.txt are its test set")
        stem = "test" if split == "test" and tested else val_list
    augmented = stem.endswith("_aug") and (base / "SegmentationClassAug").is_dir()
    masks = base / ("SegmentationClassAug" if augmented else "SegmentationClass")

    def locate(columns: Sequence[str]) -> tuple[Path, Path]:
        if len(columns) == 1:
            return base / "JPEGImages" / f"{columns[0]}.jpg", masks / f"{columns[0]}.png"
        image, mask = (base / column.lstrip("/") for column in columns)  # as in "/JPEGImages/x.jpg"
        return image, mask

    return list_pairs(lists / f"{stem}.txt", locate, split=f"split '{split}' of {base}")
