"""M&Ms, the multi-centre cardiac MR challenge of MICCAI 2020, in its official layout.

::

    ROOT/*.csv                                            one row per subject: External code, ED, ES, Vendor, ...
    ROOT/.../CODE/CODE_sa.nii.gz   CODE_sa_gt.nii.gz      short axis over time, and its masks

Two frames of each subject have masks, end-diastole and end-systole; each is a case, ``CODE_ED`` and ``CODE_ES``.
Folders such as ``Training/Labeled`` are read as they lie; subjects without a mask file are left out.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from perdure.data.readers.casefiles import CaseFiles, class_list
from perdure.data.readers.folds import by_fold
from perdure.data.readers.imagefiles import sample_name
from perdure.data.readers.volumes import VolumeSource
from perdure.data.source import Image, Mask, Split
from perdure.data.volumes.files import read_header, read_voxels
from perdure.errors import DataError

CLASSES: Final = {1: "left_ventricle", 2: "myocardium", 3: "right_ventricle"}
IMAGE, MASK = "_sa.nii.gz", "_sa_gt.nii.gz"
CODE, FRAMES = "external code", ("ED", "ES")


@dataclass(frozen=True, eq=False)
class Mnms(VolumeSource):
    """Frames of short-axis series.

    Args:
        frames: Number of the frame of each case, from 0.
    """

    frames: Mapping[str, int] = field(default_factory=dict)

    def image(self, split: Split, name: str) -> Image:
        """Image ``(1, D, H, W)`` float32 of the case's frame."""
        return np.asarray(self._frame(self.case(split, name).images[0], name), np.float32)[None]

    def mask(self, split: Split, name: str) -> Mask:
        """Label map ``(D, H, W)`` int16 of the case's frame."""
        path = self.case(split, name).mask
        return self.class_ids(path, self._frame(path, name), name)

    def reading(self) -> bytes:
        """Also the frames."""
        return super().reading() + repr(sorted(self.frames.items())).encode()

    def _frame(self, path: Path, name: str) -> npt.NDArray[Any]:
        header, number = read_header(path), self.frames[name]
        if number >= max(1, header.channels):
            raise DataError(
                f"{path} has {max(1, header.channels)} frames, and the table gives frame {number} for '{name}'",
                "correct the table, where frames count from 0, or restore the file",
            )
        voxels = read_voxels(header)
        return voxels[number] if header.channels else voxels


def open_mnms(root: Path, fold: int = 0, patients: bool = True) -> Mnms:
    """Open the data of the challenge.

    Args:
        root: The folder that holds the table of subjects and, in folders inside, the subjects.
        fold: The fold whose validation cases are the test cases, from 0; no subject is divided.
        patients: False if the images may be shown; otherwise a run stores no picture of them.

    Raises:
        DataError: There is no table, no subject, or the table lacks one.
        UsageError: There is no such fold.
    """
    table = _table(root)
    space = class_list(root, dict(CLASSES))
    cases: dict[str, CaseFiles] = {}
    frames: dict[str, int] = {}
    subjects: dict[str, str] = {}
    problems: list[DataError] = []
    for mask in sorted(root.rglob(f"*{MASK}")):
        code = sample_name(mask, mask.name.removesuffix(MASK))
        image = mask.with_name(f"{code}{IMAGE}")
        if not image.is_file():
            problems.append(DataError(f"mask without image: {mask}", f"add {image.name} beside it"))
        elif code not in table:
            problems.append(DataError(f"the table of subjects does not name '{code}' ({mask})", "add its row"))
        elif f"{code}_ED" in cases:
            problems.append(DataError(f"the subject '{code}' lies in two folders: {mask}", "remove one of them"))
        else:
            for frame, number in table[code].items():
                name = f"{code}_{frame}"
                cases[name], frames[name], subjects[name] = CaseFiles((image,), mask), number, code
    if not cases and not problems:
        raise DataError(f"{root} holds no file *{MASK}", "give the folder of the challenge, with its folders inside")
    return Mnms(
        "mnms",
        root,
        space,
        by_fold(root, cases, subjects, fold, problems),
        {k: k for k in (0, *CLASSES)},
        "correct the mask",
        1,
        ("MRI",),
        groups=subjects,
        patients=patients,
        frames=frames,
    )


def _table(root: Path) -> dict[str, dict[str, int]]:
    """Frames by the code of the subject, from the table whose header has the code and both frames."""
    for path in sorted(root.glob("*.csv")):
        try:
            rows = list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines()))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path} cannot be read: {error}", "restore the table of subjects") from error
        columns = {str(name).strip().lower(): name for name in (rows[0] if rows else ())}
        if not {CODE, *(frame.lower() for frame in FRAMES)} <= columns.keys():
            continue
        found: dict[str, dict[str, int]] = {}
        for row in rows:
            numbers = {frame: str(row[columns[frame.lower()]] or "").strip() for frame in FRAMES}
            code = str(row[columns[CODE]] or "").strip()
            if not all(number.isdecimal() and len(number) < 6 for number in numbers.values()):
                raise DataError(f"{path}: subject '{code[:40]}' has no frame numbers", "ED and ES are whole numbers")
            found[code] = {frame: int(number) for frame, number in numbers.items()}
        return found
    raise DataError(f"{root} has no table of subjects", "add the .csv of the challenge (External code, ED, ES, ...)")
