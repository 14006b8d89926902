"""ADE20K scene parsing (ADEChallengeData2016): 150 classes, 0 = other."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import cast

from perdure.data.readers.pairs import Pair, PairSource, folder_pairs, identity
from perdure.data.source import Split, no_validation
from perdure.errors import DataError
from perdure.labels import IGNORE, ClassInfo, Kind, LabelSpace, spread_colors

_TABLE = Path(__file__).parent / "tables" / "ade20k.csv"


def ade20k_space() -> LabelSpace:
    """The 150 classes in the benchmark's order, with their first synonym as name."""
    with _TABLE.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    colors = spread_colors(len(rows))  # generated: the benchmark does not define a palette
    classes = (
        ClassInfo(int(row["id"]), row["name"], cast(Kind, row["kind"]), color)
        for row, color in zip(rows, colors, strict=True)
    )
    return LabelSpace(tuple(classes), "other")


def open_ade20k(root: Path) -> PairSource:
    """Open ADE20K; images are in sorted file order. Test is the folder ``validation``, as published.

    There is no validation set then: the masks of the benchmark's test images are not public.

    If the folder has ``objectInfo150.txt``, it is compared with the built-in class table, so that a data set in the
    same layout with other classes is an error.

    Args:
        root: ``ADEChallengeData2016`` or the folder that holds it.

    Raises:
        DataError: The folder has another layout, or ``objectInfo150.txt`` lists other classes.
    """
    for base in (root, root / "ADEChallengeData2016"):
        if (base / "images").is_dir() and (base / "annotations").is_dir():
            space = ade20k_space()
            _compare(base / "objectInfo150.txt", space)
            remedy = (
                "ADE20K masks hold 0..150; take annotations/ of ADEChallengeData2016, not of the full ADE20K data set"
            )
            return PairSource("ade20k", space, partial(_samples, base), identity(space), remedy, other_label=IGNORE)
    raise DataError(
        f"{root} is not the ADE20K scene-parsing data set",
        "expected {images,annotations}/{training,validation}/ in it or in ADEChallengeData2016/",
    )


def _compare(path: Path, space: LabelSpace) -> None:
    if not path.is_file():
        return
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[1:]
        listed = {
            int(parts[0]): parts[-1].split(",")[0].strip() for parts in (line.split("\t") for line in lines if line)
        }
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not the class table of ADE20K: {error}", "restore the original file") from error
    for class_id in sorted({*listed, *space.ids}):
        expected = space.name(class_id) if class_id in space.ids else None
        if listed.get(class_id) != expected:
            raise DataError(
                f"{path} names class {class_id} '{listed.get(class_id)}', ADE20K names it '{expected}'",
                "for other classes in plain folders use the data set 'folders'",
            )


def _samples(base: Path, split: Split) -> dict[str, Pair]:
    if split == "val":
        raise no_validation("ADE20K", "its published validation images are the test set")
    part = "training" if split == "train" else "validation"
    return folder_pairs(base / "images" / part, base / "annotations" / part, split=f"split '{split}' of ADE20K")
