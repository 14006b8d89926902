"""Which reader fits a folder, for people who have data and not the name of a reader."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from perdure.data.catalog import DATASETS, needs_folder
from perdure.errors import DataError, UsageError, nearest
from perdure.files import home, read_json

if TYPE_CHECKING:
    from pydantic import JsonValue

_ENTRIES: Final = 200
"""Entries of a folder that are looked at."""


def find_data(text: str) -> tuple[str, Path | None]:
    """Name of the reader and folder of a data set that is given by its folder, or by the name of built-in data.

    Raises:
        DataError: There is no such folder, or nothing in it says what it is.
        UsageError: It is the name of a data set that needs a folder.
    """
    path = Path(text).expanduser()
    if not path.exists() and text in DATASETS:
        if needs_folder(text):
            raise UsageError(f"the data set '{text}' needs a folder", f"--data DIR data.name={text}")
        return text, None
    if not path.is_dir():
        missing = "is not a folder" if path.exists() else "does not exist"
        raise DataError(f"{text} {missing}", f"give the folder of a data set; {nearest(text, DATASETS)}")
    return detect(path), path


def reader_of(text: str, options: dict[str, JsonValue]) -> tuple[str, Path | None]:
    """As :func:`find_data`; an option ``name`` names the reader instead, and is taken out of the options."""
    return (str(options.pop("name")), home(Path(text))) if "name" in options else find_data(text)


def detect(path: Path) -> str:
    """The reader whose layout a folder has. Raises DataError where it is none of them."""
    if (path / "dataset.json").exists():  # a folder or a pipe of this name is told, and no other layout is looked for
        # one key of either is enough, so that what is missing is told by the reader of the layout that was meant
        keys = _keys(path / "dataset.json")
        old = not keys.isdisjoint(("modality", "training")) and keys.isdisjoint(("channel_names", "file_ending"))
        return "decathlon" if old else "nnunet"
    inside = sorted(path.iterdir())[:_ENTRIES]
    names = {entry.name for entry in inside}
    if "JPEGImages" in names or "VOCdevkit" in names:
        return "voc"
    if {"leftImg8bit", "gtFine"} <= names:
        return "cityscapes"
    if any(entry.suffix in (".h5", ".hdf5") for entry in inside):
        return "h5_volumes"
    if any(_volumes(path / folder) for folder in ("images", "imagesTr", "train/images")):
        return "nifti_folders"
    if {"images", "masks"} <= names or (path / "train" / "masks").is_dir():
        return "folders"
    if any(entry.suffix == ".npz" for entry in inside):
        return "medmnist"
    if (path / "train").is_dir() and (path / "test").is_dir():
        return "class_folders"
    raise DataError(
        f"nothing in {path} says what kind of data set it is",
        "name the reader: data.name=NAME (`perdure list datasets` shows the layouts)",
    )


def short_name(path: Path) -> str:
    """Name of a task after its folder, without nnU-Net's number: ``Dataset001_Organs`` -> ``organs``."""
    return re.sub(r"^(Dataset|Task)\d+_", "", path.resolve().name).lower()


def _keys(path: Path) -> set[str]:
    try:
        content = read_json(path)
    except DataError as error:
        hint = "correct or restore it: it is the dataset.json of nnU-Net or of the Decathlon"
        raise DataError(error.what, hint) from error
    return set(content) if isinstance(content, dict) else set()


def _volumes(folder: Path) -> bool:
    return folder.is_dir() and any(
        re.search(r"\.(nii|nii\.gz|mha|mhd|nrrd)$", entry.name) for entry in sorted(folder.iterdir())[:_ENTRIES]
    )
