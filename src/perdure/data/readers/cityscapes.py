"""Cityscapes, fine annotations: 19 classes; all void classes are label 0 (STAR, section 1.1)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Final

from perdure.data.readers.pairs import Pair, PairSource, decoder, folder_pairs
from perdure.data.source import Split, no_validation
from perdure.errors import DataError
from perdure.labels import ClassInfo, Color, Kind, LabelSpace

# raw labelId, name, kind, colour; the class id is the position from 1
CLASSES: Final[tuple[tuple[int, str, Kind, Color], ...]] = (
    (7, "road", "stuff", (128, 64, 128)),
    (8, "sidewalk", "stuff", (244, 35, 232)),
    (11, "building", "stuff", (70, 70, 70)),
    (12, "wall", "stuff", (102, 102, 156)),
    (13, "fence", "stuff", (190, 153, 153)),
    (17, "pole", "stuff", (153, 153, 153)),
    (19, "traffic light", "stuff", (250, 170, 30)),
    (20, "traffic sign", "stuff", (220, 220, 0)),
    (21, "vegetation", "stuff", (107, 142, 35)),
    (22, "terrain", "stuff", (152, 251, 152)),
    (23, "sky", "stuff", (70, 130, 180)),
    (24, "person", "thing", (220, 20, 60)),
    (25, "rider", "thing", (255, 0, 0)),
    (26, "car", "thing", (0, 0, 142)),
    (27, "truck", "thing", (0, 0, 70)),
    (28, "bus", "thing", (0, 60, 100)),
    (31, "train", "thing", (0, 80, 100)),
    (32, "motorcycle", "thing", (0, 0, 230)),
    (33, "bicycle", "thing", (119, 11, 32)),
)
RAW_LABELS: Final = (*range(34), 255)  # labelIds of the annotation format; -1 (licence plate) is stored as 255


def open_cityscapes(root: Path) -> PairSource:
    """Open Cityscapes (fine annotations). Names are file names without ``_leftImg8bit``.

    Test is the folder ``val``, as published; there is no validation set then.

    Args:
        root: The folder that holds ``leftImg8bit`` and ``gtFine``.

    Raises:
        DataError: The folder has another layout.
    """
    if not (root / "leftImg8bit").is_dir() or not (root / "gtFine").is_dir():
        raise DataError(
            f"{root} is not the Cityscapes data set",
            "expected {leftImg8bit,gtFine}/{train,val}/CITY/ in it: unpack both archives in one folder",
        )
    space = LabelSpace(tuple(ClassInfo(k, name, kind, color) for k, (_, name, kind, color) in enumerate(CLASSES, 1)))
    table = dict.fromkeys(RAW_LABELS, 0) | {raw: k for k, (raw, *_) in enumerate(CLASSES, 1)}
    remedy = "expected labelIds 0..33: take the *_gtFine_labelIds.png files as they are in gtFine_trainvaltest"
    return PairSource("cityscapes", space, partial(_samples, root), decoder(table), remedy)


def _samples(root: Path, split: Split) -> dict[str, Pair]:
    if split == "val":
        raise no_validation("Cityscapes", "the images of its folder val are the test set")
    part = "train" if split == "train" else "val"
    # beside labelIds there are color and instanceIds files of the same image: the ending tells them apart
    endings = ("_leftImg8bit", "_gtFine_labelIds")
    images, masks = root / "leftImg8bit" / part, root / "gtFine" / part
    return folder_pairs(images, masks, endings, nested=True, split=f"split '{split}' of Cityscapes")
