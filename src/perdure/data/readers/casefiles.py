"""The files of cases: paired by name, and what a class list, ``annotated.json`` and ``patients.json`` say of them.

All layouts of volumes are made of these parts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from perdure.data.readers.imagefiles import sample_name
from perdure.data.source import Split
from perdure.errors import DataError, nearest
from perdure.files import read_json
from perdure.labels import BACKGROUND, IGNORE, IGNORE_IN_FILES, ClassInfo, LabelSpace, spread_colors, wrong_name

PATIENTS: Final = "patients.json"
"""Optional file beside the data: ``{case: patient}``."""
_VOLUMES: Final = re.compile(
    r"\.(nii|nii\.gz|mha|mhd|nrrd|hdr|gipl|mgz|npz|npy|dcm|png|bmp|tiff?|jpe?g)$", re.IGNORECASE
)
"""Names of files that somebody may have meant as a case."""
_CHANNEL: Final = re.compile(r"(.+)_(\d{4})")


class CaseFiles(NamedTuple):
    """Files of a case: of each channel, or one with all of them; and its mask."""

    images: tuple[Path, ...]
    mask: Path


class Layout(NamedTuple):
    """Cases by split, ``{"train": {name: files}, "test": {...}}``, and what is wrong with others.

    ``told`` says in words which fold they are of, unless the data set itself says what is for testing, what is left
    out, and what is odd.
    """

    splits: Mapping[Split, Mapping[str, CaseFiles]]
    problems: Sequence[DataError] = ()
    told: tuple[str, ...] = ()


def index(folder: Path, endings: Sequence[str], problems: list[DataError]) -> dict[str, Path]:
    """Files of a folder by their names without the ending, sorted, without hidden files.

    Files that look like volumes or pictures but have another ending, links that lead nowhere, names that are no text
    and two names for one case are added to ``problems``.

    Raises:
        DataError: The folder is missing or cannot be read.
    """
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(
            f"the folder {folder} cannot be read: {error.strerror}", "check the data set's layout"
        ) from error
    found: dict[str, Path] = {}
    for path in paths:
        end = next((end for end in endings if path.name.lower().endswith(end)), "")
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if end:
                what = f"{path} is a folder, and a file is expected"
                problems.append(DataError(what, "put the file in its place, or rename the folder"))
            continue
        if not end:
            if _VOLUMES.search(path.name):
                what = f"{path} does not end in {' or '.join(endings)}"
                problems.append(DataError(what, "save all cases in one format, or correct file_ending"))
            continue
        try:
            stem = sample_name(path, path.name[: -len(end)])
        except DataError as error:
            problems.append(error)
            continue
        if path.is_symlink() and not path.exists():
            what = f"{path} is a link to {path.readlink()}, which does not exist"
            problems.append(DataError(what, "restore the file behind it, or remove the link"))
        elif stem in found:
            what = f"{folder} holds both {found[stem].name} and {path.name}"
            problems.append(DataError(what, "a case has one file: remove one of them"))
        else:
            found[stem] = path
    return found


def by_channel(files: Mapping[str, Path], masks: Iterable[str]) -> dict[str, dict[int, Path]]:
    """Image files by case and channel: ``CASE_0000``, ``CASE_0001``; a file named as a mask is that case's only one."""
    cases: dict[str, dict[int, Path]] = {}
    known = frozenset(masks)
    for stem, path in files.items():
        numbered = None if stem in known else _CHANNEL.fullmatch(stem)
        case, channel = (numbered[1], int(numbered[2])) if numbered else (stem, 0)
        cases.setdefault(case, {})[channel] = path
    return cases


def paired(
    images: Mapping[str, Mapping[int, Path]],
    masks: Mapping[str, Path],
    channels: int,
    problems: list[DataError],
    modality: Sequence[str] = (),
) -> dict[str, CaseFiles]:
    """Cases with a mask and a file per channel; what is wrong with the others is added to ``problems``."""
    cases: dict[str, CaseFiles] = {}
    for name in sorted({*images, *masks}):
        files = images.get(name, {})
        if not files:
            problems.append(DataError(f"mask without image: {masks[name]}", "add the image or remove the mask"))
        elif name not in masks:
            first = next(iter(files.values()))
            problems.append(DataError(f"image without mask: {first}", "add the mask or remove the image"))
        elif absent := sorted(set(range(channels)) - set(files)):
            what = modality[absent[0]] if modality else "the other cases have it"
            problems.append(
                DataError(f"case '{name}' has no file of channel {absent[0]} ({what})", f"add {name}_{absent[0]:04d}")
            )
        elif extra := sorted(set(files) - set(range(channels))):
            what = f"{files[extra[0]]} is channel {extra[0]}, and every case has {channels}"
            problems.append(DataError(what, "remove it, or name the channel in dataset.json"))
        else:
            cases[name] = CaseFiles(tuple(files[k] for k in range(channels)), masks[name])
    problems += alike_names(cases)
    return cases


def alike_names(names: Iterable[str]) -> list[DataError]:
    """Errors of names that differ in capital letters only."""
    seen: dict[str, str] = {}
    problems = []
    for name in names:
        if other := seen.get(name.casefold()):
            what = f"the cases '{other}' and '{name}' differ in capital letters only"
            problems.append(DataError(what, "rename one of them: some file systems take both for one file"))
        seen[name.casefold()] = name
    return problems


def class_list(path: Path, classes: Mapping[int, str], background: str = "background") -> LabelSpace:
    """Label space of the numbers and names that a description holds. Raises DataError for what no class can be."""
    if not classes:
        raise DataError(
            f"{path} names no class besides the background", 'write "labels": {"background": 0, "liver": 1}'
        )
    for number, name in classes.items():
        if not BACKGROUND < number < IGNORE:
            what = f"{path}: number {number} of '{name}' is out of range"
            raise DataError(what, f"classes are numbered from 1 to {IGNORE - 1}; 0 is background")
        if problem := wrong_name(name):
            raise DataError(f"{path}: {problem}", "shorten or correct the name")
    names = list(classes.values())
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise DataError(f"{path} gives the name '{twice}' to two numbers", "give each class its own name")
    colors = spread_colors(len(classes))
    return LabelSpace(
        tuple(
            ClassInfo(number, classes[number], "organ", color)
            for number, color in zip(sorted(classes), colors, strict=True)
        ),
        background,
    )


def channel_list(path: Path, names: Iterable[object]) -> tuple[str, ...]:
    """Names of channels that a description holds. Raises DataError for what is no name."""
    channels = tuple(map(str, names))
    if problem := next(filter(None, map(wrong_name, channels)), ""):
        raise DataError(f"{path}: of a channel {problem}", "shorten or correct the name")
    return channels


def plain_labels(space: LabelSpace) -> dict[int, int]:
    """Numbers in masks -> ids where both are the same, and 255 means "ignore" unless it is a class."""
    return {IGNORE_IN_FILES: IGNORE, BACKGROUND: BACKGROUND} | {k: k for k in space.ids}


def annotated_classes(
    root: Path, names: Iterable[str], space: LabelSpace, problems: list[DataError]
) -> dict[str, frozenset[int]]:
    """Ids that single cases label, from ``annotated.json``; unknown cases and classes are added to ``problems``."""
    path = root / "annotated.json"
    known = set(names)
    ids = {space.name(k): k for k in space.ids}
    annotated: dict[str, frozenset[int]] = {}
    for case, classes in _mapping(path).items():
        unknown = [name for name in classes if name not in ids] if isinstance(classes, list) else []
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            what = f"{path}: '{case}' has no list of class names"
            problems.append(DataError(what, 'write {"case": ["liver", "spleen"]}'))
        elif case not in known:
            problems.append(DataError(f"{path} names the case '{case}', which is not there", nearest(case, known)))
        elif unknown:
            what = f"{path}: '{case}' lists '{unknown[0]}', which is no class"
            problems.append(DataError(what, nearest(unknown[0], ids)))
        else:
            annotated[case] = frozenset(ids[name] for name in classes)
    return annotated


def patient_of(root: Path, names: Iterable[str], problems: list[DataError]) -> dict[str, str]:
    """Patient of every case, from ``patients.json``; empty without it.

    Added to ``problems``: cases that it lacks, patients that are neither text nor a number, and cases of which there is
    no file. That of a case without a mask is there, and may be listed.
    """
    path = root / PATIENTS
    listed = _mapping(path)
    if not path.exists():
        return {}
    known = set(names)
    found: dict[str, str] = {}
    for name in sorted(known):
        patient = listed.get(name)
        if name not in listed:
            what = f"{path} does not name the patient of '{name}'"
            problems.append(DataError(what, 'list every case: {"case": "patient"}'))
        elif isinstance(patient, bool) or not isinstance(patient, str | int) or patient == "":
            what = f"{path}: the patient of '{name}' is {json.dumps(patient)[:40]}, which is no name"
            problems.append(DataError(what, 'write one name or number per case: {"case": "patient"}'))
        else:
            found[name] = str(patient)
    if absent := set(listed) - known:
        files = [place.name for place in root.glob("*/*")]
        for name in sorted(absent):
            if not any(re.match(rf"{re.escape(name)}(_\d{{4}})?\.", file) for file in files):
                what = f"{path} names the case '{name}', which is not there"
                problems.append(DataError(what, nearest(name, known)))
    return found


def _mapping(path: Path) -> dict[str, Any]:
    """An optional JSON file of ``{case: value}``."""
    if not path.exists():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} is no mapping of cases", 'write {"case": ...}')
    return content
