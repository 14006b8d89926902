"""The fundus photographs of several sites that DoFE was published with (IEEE TMI 2020), in their official layout.

::

    ROOT/Domain1/train/ROIs/image/*.png   ROOT/Domain1/train/ROIs/mask/*.png
    ROOT/Domain1/test/ROIs/image/*.png    ROOT/Domain1/test/ROIs/mask/*.png        and so on to Domain4

Images are squares around the optic disc. Grey values in masks: 0 cup, 128 disc outside of the cup, 255 background.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from perdure.data.readers.casefiles import CaseFiles, Layout, class_list, index, paired
from perdure.data.readers.volumes import PICTURES, VolumeSource
from perdure.data.source import Split
from perdure.errors import DataError

CLASSES: Final = {1: "optic_cup", 2: "optic_disc"}
"""The second one is the rim: the disc without the cup."""
CODES: Final = {0: 1, 128: 2, 255: 0}
"""Grey value in a mask -> class id."""


def open_fundus_sites(root: Path, sites: list[str] | None = None, patients: bool = True) -> VolumeSource:
    """Open the photographs. The official test sets are the test set.

    Args:
        root: The folder that holds ``Domain1`` to ``Domain4``.
        sites: Names of the folders that are read; all that are there if not given.
        patients: False if the images may be shown; otherwise a run stores no picture of them.

    Raises:
        DataError: A folder is missing.
    """
    chosen = sites or sorted(folder.name for folder in root.glob("Domain*") if folder.is_dir())
    if not chosen:
        raise DataError(f"{root} holds no folder Domain1, Domain2, ...", "give the folder that holds the sites")
    splits: dict[Split, dict[str, CaseFiles]] = {"train": {}, "test": {}}
    problems: list[DataError] = []
    for site in chosen:
        for split, cases in splits.items():
            images, masks = (
                index(root / site / split / "ROIs" / part, PICTURES, problems) for part in ("image", "mask")
            )
            found = paired({name: {0: path} for name, path in images.items()}, masks, 1, problems)
            cases |= {f"{site}_{split}_{name}": files for name, files in found.items()}
    return VolumeSource(
        "fundus_sites",
        root,
        class_list(root, dict(CLASSES)),
        Layout(splits, problems),
        CODES,
        "masks hold 0 (cup), 128 (disc) and 255 (background)",
        3,
        ("R", "G", "B"),
        patients=patients,
        dims=2,
    )
