"""Plain folders of images and masks with a class file.

Splits are given in one of three ways::

    ROOT/classes.txt  ROOT/{train,val,test}/images/  ROOT/{train,val,test}/masks/
    ROOT/classes.txt  ROOT/images/  ROOT/masks/  ROOT/{train,val,test}.txt        one sample name per line
    ROOT/classes.txt  ROOT/images/  ROOT/masks/                                   with the option holdout

An image and its mask have the same name except for the suffix. Class files: :mod:`perdure.data.readers.classfile`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from perdure.data.readers.classfile import CLASS_FILES, find_class_file, read_class_file
from perdure.data.readers.pairs import (
    Decoder,
    Pair,
    PairingError,
    PairSource,
    decoder,
    folder_pairs,
    identity,
    list_pairs,
)
from perdure.data.source import SPLITS, AbsentSplitError, Split, no_validation
from perdure.errors import DataError, UsageError, nearest
from perdure.labels import BACKGROUND, IGNORE, IGNORE_IN_FILES, LabelSpace


def open_folders(
    root: Path,
    classes: Path | None = None,
    values: Mapping[int, int | str] | None = None,
    holdout: int | None = None,
    patients: bool = False,
    every_pixel: bool = False,
) -> PairSource:
    """Open a folder of images, masks and a class file.

    Without a test split, val is the test set, and there is no validation set: the same images are never both.

    Args:
        root: The folder.
        classes: Class file outside ``root``.
        values: Number in the masks -> class id or name, 0 or ``ignore``, for masks without class ids, e.g.
            ``{255: 1, 128: ignore}``. Numbers that it does not list are then errors, except 0.
        holdout: Without lists or split folders: every ``holdout``-th image of the sorted names is test, the others
            are train.
        patients: True if the images come from patients: a run then stores no picture of them.
        every_pixel: True if every pixel has a class: figures then leave label 0 out.

    Raises:
        DataError: Folder, class file or masks are missing.
        UsageError: An option is invalid.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder", "give the folder that holds images/, masks/ and a class file")
    if not any((root / part / "images").is_dir() for part in ("", *SPLITS)):
        raise DataError(
            f"{root} holds no images/ folder",
            "expected images/ and masks/, or train/images/ and train/masks/ and so on",
        )
    path = classes or find_class_file(root)
    if path is None:
        raise DataError(
            f"{root} has no class file ({', '.join(CLASS_FILES)})", "write a classes.txt with one 'id name' per line"
        )
    if holdout is not None and holdout < 2:
        raise UsageError(f"holdout is {holdout}", "give 2 or more: every n-th image is for testing")
    splits = [part for p in SPLITS for part in (f"{p}.txt", p) if (root / part).exists()]
    if holdout is not None and splits:
        raise UsageError(f"holdout={holdout}, but {root} has splits: {', '.join(splits)}", "leave holdout out")
    space = read_class_file(path)
    if every_pixel:
        space = LabelSpace(space.classes, background=None)
    say = "add it to values" if values else "say what it means: values={LABEL: 1} (data.values in a recipe)"
    remedy = f"add the class to {path}, correct the mask, or {say}"
    lister = partial(_samples, root, holdout)
    return PairSource("folders", space, lister, _decoder(space, values), remedy, patients=patients)


def _decoder(space: LabelSpace, values: Mapping[int, int | str] | None) -> Decoder:
    if not values:
        return identity(space)
    table = {BACKGROUND: BACKGROUND}
    ids = {space.name(k): k for k in (BACKGROUND, *space.ids)}
    for raw, meaning in values.items():
        if isinstance(meaning, str) and not meaning.isdigit() and meaning not in ("ignore", *ids):
            raise UsageError(
                f"values: {raw} means '{meaning}', which is no class",
                f"{nearest(meaning, ('ignore', *ids))} or give an id",
            )
        class_id = ids.get(meaning, meaning) if isinstance(meaning, str) else meaning
        class_id = int(class_id) if isinstance(class_id, str) and class_id.isdigit() else class_id
        if not 0 <= raw < 1 << 16:
            raise UsageError(f"values: {raw} cannot occur in a mask", "masks hold 0 to 65535")
        if class_id not in (BACKGROUND, "ignore", *space.ids):
            hint = f"classes: {', '.join(map(str, space.ids))}; also 0 and ignore"
            if class_id == IGNORE_IN_FILES:  # published sets use 255 for ignore, but here it could be a class id
                hint = f"write {raw}: ignore for pixels that count nowhere; {class_id} has to be a class"
            raise UsageError(f"values: {raw} means class {class_id}, which is not in the class file", hint)
        table[raw] = IGNORE if class_id == "ignore" else int(class_id)
    return decoder(table)


def _samples(root: Path, holdout: int | None, split: Split) -> dict[str, Pair]:
    folders = any((root / part).is_dir() for part in SPLITS)
    lists = any((root / f"{part}.txt").is_file() for part in SPLITS)
    if folders and lists:
        raise DataError(f"{root} has both split folders and split lists", "keep the folders or the lists")

    def locate(line: Sequence[str]) -> tuple[Path, Path]:
        return root / "images" / f"{line[0]}.png", root / "masks" / f"{line[0]}.png"

    there = {part: (root / part).is_dir() or (root / f"{part}.txt").is_file() for part in SPLITS}
    if split == "val" and there["val"] and not there["test"]:
        raise no_validation(str(root), "there is no test split, so that its val images are the test set")
    part: Split = "val" if split == "test" and not there["test"] else split
    if there[part]:
        if folders:
            return folder_pairs(root / part / "images", root / part / "masks")
        return list_pairs(root / f"{part}.txt", locate, columns=1)
    if not folders and not lists:
        if holdout is None:
            raise DataError(
                f"{root} does not say which images are for training and which for testing",
                "write train.txt and test.txt, one sample name per line, or holdout=5 for every fifth image",
            )
        if split == "val":
            raise no_validation(str(root), "holdout makes training and test images only")

        def chosen(pairs: Mapping[str, Pair], every: int = holdout) -> dict[str, Pair]:
            return {
                name: pair for k, (name, pair) in enumerate(pairs.items()) if (k % every == 0) != (split == "train")
            }

        try:
            return chosen(folder_pairs(root / "images", root / "masks"))
        except PairingError as error:
            error.pairs = chosen(error.pairs)
            raise
    if split == "val":
        raise no_validation(str(root), "there is no val.txt and no val/images/")
    raise AbsentSplitError(f"{root} has no split '{split}'", f"add {split}.txt or {split}/images/ and {split}/masks/")
