"""Plain folders of volumes: images, masks, and a class file.

::

    ROOT/classes.txt  ROOT/images/CASE.nii.gz        ROOT/labels/CASE.nii.gz      (or masks/)
    ROOT/classes.txt  ROOT/images/CASE_0000.nii.gz   ROOT/labels/CASE.nii.gz      one file per channel
    ROOT/train.txt    ROOT/test.txt                                               optional: one case per line

An image and its mask have the same name, and any of the formats that are read. Class files:
:mod:`perdure.data.readers.classfile`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from perdure.data.readers.casefiles import (
    annotated_classes,
    by_channel,
    index,
    paired,
    patient_of,
    plain_labels,
)
from perdure.data.readers.classfile import CLASS_FILES, find_class_file, read_class_file
from perdure.data.readers.folds import divided
from perdure.data.readers.volumes import VolumeSource
from perdure.data.volumes.files import ENDINGS
from perdure.errors import DataError


def open_nifti_folders(root: Path, classes: Path | None = None, fold: int = 0, patients: bool = True) -> VolumeSource:
    """Open folders of volumes and masks.

    Args:
        root: The folder that holds ``images`` and ``labels`` (or ``masks``).
        classes: Class file outside ``root``. 255 in masks means "ignore", unless it is a class.
        fold: Without ``train.txt`` and ``test.txt``: the fold whose validation cases are the test cases, from 0, as
            nnU-Net makes its five. With ``patients.json`` in ``root``, ``{case: patient}``, no patient is divided.
        patients: False if the images may be shown; otherwise a run stores no picture of them.

    Raises:
        DataError: A folder or the class file is missing, or a list names cases that are not there.
        UsageError: There is no such fold, or there are lists.
    """
    masks_in = next((root / part for part in ("labels", "masks") if (root / part).is_dir()), None)
    if masks_in is None or not (root / "images").is_dir():
        raise DataError(f"{root} lacks images/ or labels/ (or masks/)", "put images and masks into these folders")
    class_file = classes or find_class_file(root)
    if class_file is None:
        hint = "write a classes.txt with one 'id name' per line"
        raise DataError(f"{root} has no class file ({', '.join(CLASS_FILES)})", hint)
    space = read_class_file(class_file)
    problems: list[DataError] = []
    masks = index(masks_in, ENDINGS, problems)
    images = by_channel(index(root / "images", ENDINGS, problems), masks)
    # as many channels as most cases have: the others are told, whichever there are more of
    counts = Counter(len(files) for name, files in images.items() if name in masks)
    channels = counts.most_common(1)[0][0] if counts else 1
    cases = paired(images, masks, channels, problems)
    if not cases and not problems:
        raise DataError(f"{root / 'images'} holds no volume", f"read are {', '.join(ENDINGS)}")
    names = {*images, *masks}
    patient = patient_of(root, names, problems)
    aliases = {name: name for name in names} | {path.name: name for name, path in masks.items()}
    layout = divided(root, (".txt",), cases, aliases, patient, fold, problems)
    return VolumeSource(
        "nifti_folders",
        root,
        space,
        layout,
        plain_labels(space),
        f"add the class to {class_file}, or correct the mask",
        channels,
        (),
        annotated_classes(root, names, space, problems),
        patient,
        patients,
    )
