"""CamVid road scenes with the 11 classes of the SegNet release. Every pixel has a class; raw label 11 is void."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Final

from perdure.data.readers.pairs import Pair, PairSource, decoder, list_pairs
from perdure.data.source import SPLITS, Split
from perdure.errors import DataError
from perdure.labels import IGNORE, IGNORE_IN_FILES, ClassInfo, Color, Kind, LabelSpace

# raw label k is class k + 1
CLASSES: Final[tuple[tuple[str, Kind, Color], ...]] = (
    ("sky", "stuff", (128, 128, 128)),
    ("building", "stuff", (128, 0, 0)),
    ("pole", "stuff", (192, 192, 128)),
    ("road", "stuff", (128, 64, 128)),
    ("pavement", "stuff", (60, 40, 222)),
    ("tree", "stuff", (128, 128, 0)),
    ("sign", "stuff", (192, 128, 128)),
    ("fence", "stuff", (64, 64, 128)),
    ("car", "thing", (64, 0, 128)),
    ("pedestrian", "thing", (64, 64, 0)),
    ("bicyclist", "thing", (0, 128, 192)),
)
VOID: Final = 11


def open_camvid(root: Path) -> PairSource:
    """Open CamVid: ``{train,val,test}/``, ``{train,val,test}annot/`` and ``{train,val,test}.txt``.

    A line of a list is a name, or an image path and a mask path with any prefix (the original lists say
    ``/SegNet/CamVid/train/x.png``). Images may be JPEG or PNG. Id 0 does not occur here: it appears only in the data
    sets of tasks, for pixels of classes that a task does not label.

    Args:
        root: The folder that holds the lists.

    Raises:
        DataError: The folder has another layout.
    """
    if not any((root / f"{split}.txt").is_file() for split in SPLITS):
        raise DataError(
            f"{root} is not the CamVid data set",
            "expected train.txt, val.txt, test.txt and the folders train/, trainannot/, val/, ... in it",
        )
    space = LabelSpace(tuple(ClassInfo(k, *row) for k, row in enumerate(CLASSES, 1)), background=None)
    table = decoder({VOID: IGNORE, IGNORE_IN_FILES: IGNORE} | {k: k + 1 for k in range(len(CLASSES))})
    remedy = "CamVid masks of this release hold 0..10 and 11 or 255 for void; the 32-class masks are another release"
    return PairSource("camvid", space, partial(_samples, root), table, remedy)


def _samples(root: Path, split: Split) -> dict[str, Pair]:
    def locate(columns: Sequence[str]) -> tuple[Path, Path]:
        if len(columns) == 1:
            return root / split / f"{columns[0]}.png", root / f"{split}annot" / f"{columns[0]}.png"
        # only folder and file are taken: the original lists begin with a path of their authors' machine
        image, mask = (root.joinpath(*PurePosixPath(column).parts[-2:]) for column in columns)
        return image, mask

    return list_pairs(root / f"{split}.txt", locate, split=f"split '{split}' of CamVid")
