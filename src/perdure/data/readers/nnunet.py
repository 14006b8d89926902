"""nnU-Net v2's raw folders, exactly as they are: ``nnUNet_raw/DatasetXXX_NAME``.

``dataset.json`` gives ``channel_names``, ``labels`` and ``file_ending``; images are ``imagesTr/CASE_0000.nii.gz``,
``CASE_0001.nii.gz``, ... for the channels, masks ``labelsTr/CASE.nii.gz``. With ``dataset`` in it, the files are those
that it lists. The label ``ignore`` counts nowhere.

Regions (labels that are lists of numbers) overlap, but a mask holds one number per voxel. They become the exclusive
classes that nnU-Net's own predicted masks hold: regions are painted over each other in their order, with the numbers of
``regions_class_order``. A region of which later ones cover a part is then called "rest of NAME".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from perdure.data.readers.casefiles import (
    CaseFiles,
    Layout,
    annotated_classes,
    by_channel,
    channel_list,
    class_list,
    index,
    paired,
    patient_of,
)
from perdure.data.readers.folds import by_fold, refuse_divided
from perdure.data.readers.volumes import LARGEST, PICTURES, VolumeSource
from perdure.data.volumes.files import ENDINGS
from perdure.errors import DataError, UsageError
from perdure.files import read_json
from perdure.labels import BACKGROUND, IGNORE, LabelSpace

_LABELS = 'write "labels": {"background": 0, "liver": 1}'


class _Described(NamedTuple):
    """What ``dataset.json`` says."""

    space: LabelSpace
    table: dict[int, int]
    channels: tuple[str, ...]
    ending: str
    listed: Mapping[str, Any] | None
    number: object
    """``numTraining``, whatever it is: no reader needs it."""


def open_nnunet(root: Path, fold: int = 0, patients: bool = True) -> VolumeSource:
    """Open a raw data set of nnU-Net v2.

    Test cases are those of ``imagesTs`` that have a mask in ``labelsTs``. Without ``labelsTs`` they are the validation
    cases of a fold; there is no validation set in either case.

    Args:
        root: The folder that holds ``dataset.json``.
        fold: Without ``labelsTs``: the fold whose validation cases are the test cases, from 0. From
            ``splits_final.json`` in ``root``, otherwise nnU-Net's own five (fewer where there are fewer patients). With
            ``patients.json`` in ``root``, ``{case: patient}``, no patient is divided.
        patients: False if the images may be shown; otherwise a run stores no picture of them.

    Raises:
        DataError: The folder or ``dataset.json`` is not as nnU-Net has it.
        UsageError: There is no such fold.
    """
    path = root / "dataset.json"
    if not path.is_file():
        raise DataError(f"{root} has no dataset.json", "give the folder DatasetXXX_NAME inside nnUNet_raw")
    told = _described(path)
    problems: list[DataError] = []
    apart = (root / "labelsTs").is_dir() and told.listed is None
    # of a data set that was learned only the test cases may be kept; who learns it is told that train is empty
    kept = apart and not any((root / part).exists() for part in ("imagesTr", "labelsTr"))
    train = {} if kept else _cases(root, "Tr", told, problems)
    test = _cases(root, "Ts", told, problems) if apart else {}
    names = sorted({*train, *test})
    patient = patient_of(root, names, problems)
    if test:
        if fold:
            raise UsageError(f"fold={fold}, but {root} has test cases in labelsTs", "leave fold out")
        refuse_divided(str(root), sorted(train), sorted(test), patient)
        layout = Layout({"train": train, "test": test}, problems)
    else:
        layout = by_fold(root, train, patient, fold, problems)
    if unlabelled := _unlabelled(root, told):
        many = "1 case has" if unlabelled == 1 else f"{unlabelled} cases have"
        left_out = f"imagesTs: {many} no mask in labelsTs and {'is' if unlabelled == 1 else 'are'} left out"
        layout = layout._replace(told=(*layout.told, left_out))
    if isinstance(told.number, int) and told.number != len(train):
        odd = f"{path.name} says numTraining {told.number}, and {len(train)} cases are there: is the copy complete?"
        layout = layout._replace(told=(*layout.told, odd))
    pictures = told.ending in PICTURES
    return VolumeSource(
        "nnunet",
        root,
        told.space,
        layout,
        told.table,
        f"add the label to {path}, or correct the mask",
        len(told.channels),
        told.channels,
        annotated_classes(root, names, told.space, problems),
        patient,
        patients,
        2 if pictures else 3,
    )


def _described(path: Path) -> _Described:
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} is no description of a data set", "expected channel_names, labels and file_ending")
    for key in ("labels", "channel_names", "file_ending"):
        if key not in content:
            old = "modality" in content and "training" in content
            raise DataError(
                f"{path} has no '{key}'",
                "it is in the layout of the Medical Segmentation Decathlon: use the data set decathlon"
                if old
                else "nnU-Net v2 needs channel_names, labels and file_ending",
            )
    ending = content["file_ending"]
    if ending not in (*ENDINGS, *PICTURES):
        hint = f"read are {', '.join((*ENDINGS, *PICTURES))}"
        raise DataError(f"{path}: files that end in '{ending}' are not read", hint)
    names = content["channel_names"]
    if not isinstance(names, dict) or set(names) != {str(k) for k in range(len(names))} or not names:
        raise DataError(f"{path}: channel_names is {names}", 'number the channels: {"0": "T1", "1": "T2"}')
    listed = content.get("dataset")
    if listed is not None and not isinstance(listed, dict):
        raise DataError(f"{path}: 'dataset' is no mapping", 'expected {"case": {"images": [...], "label": "..."}}')
    space, table = _classes(path, content["labels"], content.get("regions_class_order"))
    channels = channel_list(path, (names[str(k)] for k in range(len(names))))
    return _Described(space, table, channels, ending, listed, content.get("numTraining"))


def _classes(path: Path, labels: object, order: object) -> tuple[LabelSpace, dict[int, int]]:
    """Exclusive classes, and what the numbers in masks become."""
    if not isinstance(labels, dict):
        what = (
            f"{path}: labels are {'a list' if isinstance(labels, list) else repr(labels)[:40]}, not names with numbers"
        )
        raise DataError(what, _LABELS)
    if labels.get("0") == "background":
        raise DataError(f"{path}: labels give names to numbers; nnU-Net v2 gives numbers to names", _LABELS)
    if labels.get("background") != BACKGROUND:
        raise DataError(f"{path}: labels do not give 0 to 'background'", _LABELS)
    regions: dict[str, list[int]] = {}
    for name, numbers in labels.items():
        numbers = numbers if isinstance(numbers, list) else [numbers]
        if not numbers or not all(type(n) is int and 0 <= n <= LARGEST for n in numbers):
            raise DataError(f"{path}: label '{name}' is {labels[name]}", f"numbers run from 0 to {LARGEST}")
        regions[name] = numbers
    ignore = regions.pop("ignore", [])
    del regions["background"]
    if len(ignore) > 1 or any(ignore[:1] == [n] for numbers in regions.values() for n in numbers):
        raise DataError(f"{path}: 'ignore' is {labels['ignore']}", "give it a number of its own")
    if any(BACKGROUND in numbers for numbers in regions.values()):
        raise DataError(f"{path}: a label other than 'background' holds 0", "0 is background")
    table = {BACKGROUND: BACKGROUND} | dict.fromkeys(ignore, IGNORE)
    if any(len(numbers) > 1 for numbers in regions.values()):
        classes, painted = _painted(path, regions, order)
        return class_list(path, classes), table | painted
    single = {name: numbers[0] for name, numbers in regions.items()}
    for name, number in single.items():
        if other := next((o for o in single if o != name and single[o] == number), ""):
            raise DataError(f"{path}: '{name}' and '{other}' both have the number {number}", "number each class")
    return class_list(path, {n: name for name, n in single.items()}), table | {n: n for n in single.values()}


def _painted(path: Path, regions: Mapping[str, list[int]], order: object) -> tuple[dict[int, str], dict[int, int]]:
    """Classes, and the class of each number, after regions were painted over each other with the numbers of ``order``.

    A number belongs to the last region that holds it, as in ``LabelManager.convert_logits_to_segmentation`` of nnU-Net.
    """
    if not isinstance(order, list) or len(order) != len(regions) or not all(type(n) is int for n in order):
        hint = f"one number per region, in the order of labels: {', '.join(regions)}"
        raise DataError(f"{path}: labels are regions, and regions_class_order is {order}", hint)
    if len(set(order)) < len(order):
        raise DataError(f"{path}: regions_class_order {order} holds a number twice", "number each region")
    table = {n: number for numbers, number in zip(regions.values(), order, strict=True) for n in numbers}
    classes: dict[int, str] = {}
    for (name, numbers), number in zip(regions.items(), order, strict=True):
        left = {n for n in numbers if table[n] == number}
        if not left:
            raise DataError(
                f"{path}: the region '{name}' is covered wholly by later ones, so that no voxel is left for it",
                "list large regions before the smaller ones inside them, in labels and in regions_class_order",
            )
        classes[number] = name if left == set(numbers) else f"rest of {name}"
    return classes, table


def _cases(root: Path, part: str, told: _Described, problems: list[DataError]) -> dict[str, CaseFiles]:
    """Cases of ``imagesTr`` and ``labelsTr`` (or Ts), or those that ``dataset.json`` lists."""
    if told.listed is not None:
        return {name: _listed_case(root, name, files, told) for name, files in sorted(told.listed.items())}
    masks = index(root / f"labels{part}", (told.ending,), problems)
    images = index(root / f"images{part}", (told.ending,), problems)
    if not images and not problems:
        what = f"{root / f'images{part}'} holds no file that ends in {told.ending}"
        raise DataError(what, "correct file_ending in dataset.json, or add the images")
    cases: dict[str, dict[int, Path]] = {}
    for stem, path in images.items():
        ((case, files),) = by_channel({stem: path}, ()).items()
        if case == stem:
            what = f"{path} has no number of its channel"
            problems.append(DataError(what, f"nnU-Net calls it {stem}_0000{told.ending}"))
            continue
        cases.setdefault(case, {}).update(files)
    if part == "Ts":  # cases without a mask cannot be measured, and are many in published sets
        cases = {case: files for case, files in cases.items() if case in masks}
    channels = len(told.channels)
    if told.ending in PICTURES and channels == 3 and all(set(files) == {0} for files in cases.values()):
        channels = 1  # one colour picture
    return paired(cases, masks, channels, problems, told.channels)


def _unlabelled(root: Path, told: _Described) -> int:
    """Number of cases of ``imagesTs`` without a mask in ``labelsTs``."""
    if told.listed is not None or not (root / "imagesTs").is_dir():
        return 0
    images, masks = (
        # what is wrong with a file is told where it is used
        index(root / part, (told.ending,), []) if (root / part).is_dir() else {}
        for part in ("imagesTs", "labelsTs")
    )
    return len(by_channel(images, ()).keys() - masks.keys())


def _listed_case(root: Path, name: str, files: object, told: _Described) -> CaseFiles:
    match files:
        case {"images": [str(), *_] as images, "label": str(mask)} if all(type(image) is str for image in images):
            paths = tuple(root / image for image in images)
        case _:
            what = f"{root / 'dataset.json'}: '{name}' in 'dataset' has no images or no label"
            raise DataError(what, 'expected {"images": ["..."], "label": "..."}')
    if told.ending not in PICTURES and len(paths) != len(told.channels):
        what = f"{root / 'dataset.json'}: '{name}' has {len(paths)} images, and channel_names has {len(told.channels)}"
        raise DataError(what, "list a file per channel")
    return CaseFiles(paths, root / mask)
