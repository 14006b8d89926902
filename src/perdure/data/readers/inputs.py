"""Files to predict: images, and volumes with one file per channel, as cases without labels."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from perdure.data.case import Geometry
from perdure.data.readers.imagefiles import IMAGE_SUFFIXES, sample_name
from perdure.data.source import Image
from perdure.data.volumes.files import ENDINGS, WRITTEN, ending
from perdure.errors import DataError

KNOWN: Final = (*IMAGE_SUFFIXES, *ENDINGS)
_CHANNEL: Final = re.compile(r"(.+)_(\d{4})")


class Input(NamedTuple):
    """A case to predict.

    Args:
        name: What its label map is called, without an ending.
        files: One file, or one per channel.
        ending: That of the label map of a volume; empty for images.
    """

    name: str
    files: tuple[Path, ...]
    ending: str = ""

    @property
    def target(self) -> str:
        """Name of the file of its label map."""
        return f"{self.name}{self.ending or '.png'}"


def find_images(inputs: Iterable[Path], endings: Sequence[str] = IMAGE_SUFFIXES) -> list[Path]:
    """Files that end so among files and folders (searched without going deeper), sorted within each folder.

    Raises:
        DataError: A path does not exist, cannot be read, has another ending or is given twice, or nothing was found.
    """
    places, wanted = list(inputs), tuple(endings)
    one, many = _words(wanted)
    found: list[Path] = []
    others: list[Path] = []
    for path in places:
        if path.is_dir():
            try:
                inside = sorted(p for p in path.iterdir() if not p.name.startswith("."))
            except OSError as error:
                raise DataError(
                    f"the folder {path} cannot be read: {error.strerror}", "check who may read it"
                ) from error
            found += (named := [p for p in inside if p.name.lower().endswith(wanted)])
            if lost := [p for p in named if not p.is_file()]:  # told, for nobody would miss a scan that is left out
                raise DataError(
                    f"{lost[0]} is named like {one} and is no file: a folder, a pipe, or a link that leads nowhere",
                    "put the file itself in its place, or take it out of the folder",
                )
            others += [p for p in inside if p.name.lower().endswith(KNOWN) and not p.name.lower().endswith(wanted)]
        elif not path.exists():
            raise DataError(f"{path} does not exist", f"give {many}, or folders that hold some")
        elif path.name.lower().endswith(wanted):
            found.append(path)
        elif path.name.lower().endswith(KNOWN):
            raise _other(path, wanted)
        else:
            raise DataError(f"{path} is not {one} that can be read", f"readable: {', '.join(wanted)}")
    if not found and others:
        raise _other(others[0], wanted)
    if not found:
        where = f" in {places[0]}" if len(places) == 1 else f" in {len(places)} folders" if places else ""
        raise DataError(f"no {many} found{where}", f"looked for {', '.join(wanted)}, not in folders inside")
    known: set[Path] = set()
    for path in found:
        whole = path.parent.resolve() / path.name  # a link to a file keeps its own name: it may be there on purpose
        if whole in known:
            raise DataError(f"{path} is given twice", "name each file once, by itself or by its folder")
        known.add(whole)
    return found


def _words(wanted: Sequence[str]) -> tuple[str, str]:
    if IMAGE_SUFFIXES[0] not in wanted:
        return "a volume", "volumes"
    return ("an image or a volume", "images or volumes") if ENDINGS[0] in wanted else ("an image", "images")


def _other(path: Path, wanted: Sequence[str]) -> DataError:
    """A volume for a model of photographs, or a picture for a model of volumes."""
    found, learned = ("a volume", "photographs") if ending(path) else ("an image", "volumes")
    return DataError(f"{path} is {found}, and the model learned from {learned}", f"readable: {', '.join(wanted)}")


def find_cases(inputs: Iterable[Path], endings: Sequence[str], channels: Sequence[int]) -> list[Input]:
    """Cases among files and folders, each with its channels: ``CASE.nii.gz``, or ``CASE_0000.nii.gz`` and so on.

    A number of four digits at the end of a name is that of a channel where the file of channel 0 is there too, as
    nnU-Net names files; else it is part of the name.

    Args:
        inputs: Files and folders.
        endings: Of the files that the model reads.
        channels: Numbers of channels that it takes.

    Raises:
        DataError: See :func:`find_images`; or a case lacks a channel or has too many.
    """
    folders: dict[tuple[Path, str], dict[str, Path]] = {}
    for path in find_images(inputs, endings):
        end = ending(path) or path.suffix
        stem = sample_name(path, path.name[: -len(end)])
        folders.setdefault((path.parent, end), {})[stem] = path
    cases: list[Input] = []
    for (_, end), files in folders.items():
        written = "" if end.lower() in IMAGE_SUFFIXES else end if end in WRITTEN else ".mha"
        several: dict[str, dict[int, Path]] = {}
        for stem, path in files.items():
            numbered = _CHANNEL.fullmatch(stem)
            if numbered and f"{numbered[1]}_0000" in files:
                several.setdefault(numbered[1], {})[int(numbered[2])] = path
            else:
                cases.append(Input(stem, (path,), written))
        cases += [Input(name, _channels(name, parts, channels), written) for name, parts in several.items()]
    return cases


def _channels(name: str, parts: dict[int, Path], channels: Sequence[int]) -> tuple[Path, ...]:
    """Files of a case in the order of its channels."""
    gap = next((k for k in range(max(parts)) if k not in parts), None)
    if gap is not None:
        raise DataError(
            f"case '{name}' has no file of channel {gap} beside {parts[max(parts)]}", f"add {name}_{gap:04d}"
        )
    if len(parts) not in channels:
        number = " or ".join(map(str, sorted(set(channels))))
        raise DataError(
            f"case '{name}' has {len(parts)} channels ({', '.join(p.name for _, p in sorted(parts.items()))[:200]}), "
            f"and the model takes {number}",
            "give the files of the channels that it learned from; a number of four digits at the end of a name is "
            "taken for a channel",
        )
    return tuple(parts[k] for k in range(len(parts)))


def read_input(case: Input, channels: Sequence[int]) -> tuple[Image, Geometry]:
    """Image of a case, ``(C, D, H, W)`` float32 with its place or ``(C, H, W)`` uint8, as data sets are read.

    Raises:
        DataError: A file is damaged, channels do not fit together or are of another number, a voxel is NaN or infinite,
            or the volume does not fit into memory.
    """
    from perdure.data.readers.casefiles import CaseFiles, Layout
    from perdure.data.readers.volumes import VolumeSource
    from perdure.data.volumes.files import read_header
    from perdure.labels import LabelSpace

    several = len(case.files)
    if several == 1 and case.ending:
        found = read_header(case.files[0]).channels or 1  # or one file with all channels along its last axis
        several = found if found in channels else max(channels)
    elif several == 1 and 3 in channels:
        several = 3
    # the reader of data sets, so that what a model learned from and what it is shown are read alike
    layout = Layout({"test": {case.name: CaseFiles(case.files, Path())}})
    dims = 3 if case.ending else 2
    source = VolumeSource("the case", Path(), LabelSpace(()), layout, {}, "", several, dims=dims)  # type: ignore[arg-type]
    return source.image("test", case.name), source.geometry("test", case.name)
