"""Medical Segmentation Decathlon (the layout of nnU-Net v1): ``TaskXX_NAME`` with ``dataset.json``.

``training`` lists images and masks, ``labels`` the classes by number, ``modality`` the channels, which are the last
axis of a 4D image. The images under ``test`` have no masks and are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from perdure.data.readers.casefiles import (
    CaseFiles,
    alike_names,
    annotated_classes,
    channel_list,
    class_list,
    patient_of,
)
from perdure.data.readers.folds import by_fold
from perdure.data.readers.imagefiles import sample_name
from perdure.data.readers.volumes import VolumeSource
from perdure.data.volumes.files import ENDINGS, ending
from perdure.errors import DataError
from perdure.files import read_json
from perdure.labels import BACKGROUND

_KEYS: Final = (
    ("training", list, '"training": [{"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}]'),
    ("labels", dict, '"labels": {"0": "background", "1": "liver"}'),
    ("modality", dict, '"modality": {"0": "MRI"}'),
)


def open_decathlon(root: Path, fold: int = 0, patients: bool = True) -> VolumeSource:
    """Open a task of the Medical Segmentation Decathlon.

    Args:
        root: The folder that holds ``dataset.json``.
        fold: The fold whose validation cases are the test cases, from 0. From ``splits_final.json`` in ``root``,
            otherwise nnU-Net's own five (fewer where there are fewer patients). With ``patients.json`` in ``root``,
            ``{case: patient}``, no patient is divided.
        patients: False if the images may be shown; otherwise a run stores no picture of them.

    Raises:
        DataError: The folder or ``dataset.json`` is not as the Decathlon has it.
        UsageError: There is no such fold.
    """
    path = root / "dataset.json"
    if not path.is_file():
        raise DataError(f"{root} has no dataset.json", "give the folder TaskXX_NAME")
    content = _content(path)
    labels: dict[int, str] = {}
    for number, name in content["labels"].items():
        if not str(number).isdecimal() or len(str(number)) > 6 or not isinstance(name, str):
            raise DataError(
                f"{path}: label '{str(number)[:20]}' is {str(name)[:60]}",
                'write "labels": {"0": "background", "1": "liver"}',
            )
        labels[int(number)] = name
    background = labels.pop(BACKGROUND, "background")
    space = class_list(path, labels, background)
    problems: list[DataError] = []
    cases: dict[str, CaseFiles] = {}
    listed: list[str] = []
    for entry in content["training"]:
        match entry:
            case {"image": str(image), "label": str(mask)}:
                files = CaseFiles((root / image,), root / mask)
            case _:
                raise DataError(
                    f"{path}: {entry} in 'training' is no case", 'expected {"image": "...", "label": "..."}'
                )
        name = sample_name(files.mask, files.mask.name.removesuffix(ending(files.mask)))
        if name in listed:
            raise DataError(f"{path} lists '{name}' a second time", "remove the line")
        listed.append(name)
        if fault := _fault(files):
            problems.append(fault)
        else:
            cases[name] = files
    problems += alike_names(listed)
    patient = patient_of(root, listed, problems)
    named = content["modality"]
    modality = channel_list(path, (named[key] for key in sorted(named, key=lambda k: (len(k), k))))
    return VolumeSource(
        "decathlon",
        root,
        space,
        by_fold(root, cases, patient, fold, problems),
        {k: k for k in (BACKGROUND, *space.ids)},
        f"add the label to {path}, or correct the mask",
        len(modality),
        modality,
        annotated_classes(root, listed, space, problems),
        patient,
        patients,
    )


def _content(path: Path) -> dict[str, Any]:
    """What a description says, which has all that is needed of it."""
    content: Any = read_json(path)
    if not isinstance(content, dict):
        raise DataError(
            f"{path} is no description of a data set", "the Decathlon has training, labels and modality in it"
        )
    for key, kind, form in _KEYS:
        if key not in content:
            new = not {"channel_names", "file_ending"}.isdisjoint(content)
            raise DataError(
                f"{path} has no '{key}'",
                "it is in the layout of nnU-Net v2: use the data set nnunet"
                if new
                else "the Decathlon has training, labels and modality in it",
            )
        if not isinstance(content[key], kind) or not content[key]:
            raise DataError(f"{path}: '{key}' is {str(content[key])[:60]}", f"write {form}")
    return content


def _fault(files: CaseFiles) -> DataError | None:
    """The error of a case that lacks a file; None where all are there."""
    for file in (*files.images, files.mask):
        if not ending(file):
            return DataError(f"{file} is not a volume that is read", f"read are {', '.join(ENDINGS)}")
        if not file.is_file():
            lost = "is a folder, and a file is expected" if file.is_dir() else "does not exist"
            what = "is a link that leads nowhere" if file.is_symlink() and not file.exists() else lost
            return DataError(f"{file} {what}", "restore the file, or remove the case from dataset.json")
    return None
