"""The prostate MR of six sites (MS-Net, IEEE TMI 2020, and its extension), in the official layout.

::

    ROOT/BIDMC/Case00.nii.gz   ROOT/BIDMC/Case00_segmentation.nii.gz      and so on: BMC, HK, I2CVB, RUNMC, UCL

Masks of some sites tell zones apart; every number above 0 is the prostate.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from perdure.data.readers.casefiles import CaseFiles, class_list, paired
from perdure.data.readers.folds import by_fold
from perdure.data.readers.imagefiles import sample_name
from perdure.data.readers.volumes import VolumeSource
from perdure.data.volumes.files import ENDINGS, ending
from perdure.errors import DataError

ZONES: Final = 2
"""Largest number in the masks."""
_MASK: Final = re.compile(r"_seg(mentation)?$", re.IGNORECASE)


def open_prostate_sites(
    root: Path, sites: list[str] | None = None, fold: int = 0, patients: bool = True
) -> VolumeSource:
    """Open the volumes.

    Args:
        root: The folder that holds a folder per site.
        sites: Names of the folders that are read; all that hold volumes if not given.
        fold: The fold whose validation cases are the test cases, from 0.
        patients: False if the images may be shown; otherwise a run stores no picture of them.

    Raises:
        DataError: A folder is missing, or there is no volume.
        UsageError: There is no such fold.
    """
    chosen = sites or sorted(folder.name for folder in root.iterdir() if folder.is_dir())
    images: dict[str, dict[int, Path]] = {}
    masks: dict[str, Path] = {}
    for site in chosen:
        if not (root / site).is_dir():
            raise DataError(f"{root} has no folder '{site}'", "correct sites, or leave it out")
        for path in sorted((root / site).iterdir()):
            if not (end := ending(path)) or path.name.startswith("."):
                continue
            stem = sample_name(path, path.name[: -len(end)])
            name = f"{site}_{_MASK.sub('', stem)}"
            if _MASK.search(stem):
                masks[name] = path
            else:
                images[name] = {0: path}
    problems: list[DataError] = []
    cases: dict[str, CaseFiles] = paired(images, masks, 1, problems)
    if not cases and not problems:
        raise DataError(f"no folder in {root} holds a volume", f"read are {', '.join(ENDINGS)}")
    return VolumeSource(
        "prostate_sites",
        root,
        class_list(root, {1: "prostate"}),
        by_fold(root, cases, {}, fold, problems),
        {0: 0} | dict.fromkeys(range(1, ZONES + 1), 1),
        "correct the mask",
        1,
        ("T2",),
        patients=patients,
    )
