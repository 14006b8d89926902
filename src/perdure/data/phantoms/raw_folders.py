"""Phantoms as nnU-Net raw folders: volumes as int16 NIfTI files, slices as 8-bit PNG files."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from perdure.data.case import Case
from perdure.data.readers.phantoms import Phantoms, open_phantoms
from perdure.data.source import Split
from perdure.data.volumes.extra import need
from perdure.errors import UsageError
from perdure.files import TEMPORARY, write_failure, write_json

FOLDERS: Final[dict[str, dict[str, dict[str, str]]]] = {
    "torso": {
        "Dataset001_Organs": {"kind": "torso", "set": "organs"},
        "Dataset002_Vessels": {"kind": "torso", "set": "vessels"},
        "Dataset003_Lesions": {"kind": "torso", "set": "lesions"},
    },
    "slices": {
        "Dataset011_Cardiac": {"kind": "cardiac"},
        "Dataset012_Fundus": {"kind": "fundus"},
        "Dataset013_Prostate": {"kind": "prostate"},
    },
}
"""What ``perdure phantoms`` can write -> folder -> options of the data set."""
PLACES: Final[dict[Split, tuple[str, str]]] = {"train": ("imagesTr", "labelsTr"), "test": ("imagesTs", "labelsTs")}


def write_raw_folders(
    what: str, out: Path, options: Mapping[str, int | None], begin: Callable[[int], Callable[[], None]]
) -> list[Path]:
    """Write all folders of a kind; each appears under its name when it is complete.

    Args:
        what: Key of :data:`FOLDERS`.
        out: Folder to write into; it is made if missing.
        options: ``train``, ``test``, ``size``, ``source`` and ``seed`` of the data sets.
        begin: Called with the number of cases; what it returns is called after each of them.

    Raises:
        UsageError: An option is out of range, or a folder is there already. Nothing was written.
        PerdureError: The disk is full, the folder cannot be written, or a package is missing.
    """
    both: dict[Path, dict[str, Any]] = {out / name: {**fixed, **options} for name, fixed in FOLDERS[what].items()}
    sources = {path: open_phantoms(**given) for path, given in both.items()}
    if not all(source.counts["train"] for source in sources.values()):
        raise UsageError("an nnU-Net raw folder needs training cases, but --train is 0", "set --train above 0")
    there = [path for path in sources if path.exists()]
    if there:
        raise UsageError(f"{there[0]} is there already", "choose another folder, or delete it")
    advance = begin(sum(sum(source.counts.values()) for source in sources.values()))
    for path, source in sources.items():
        _write(source, path, advance)
    return list(sources)


def _write(source: Phantoms, folder: Path, advance: Callable[[], None]) -> None:
    """Write one raw folder beside its place, then move it there: nobody finds half a data set."""
    part = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder.parent))
        part.chmod(0o755)
        ending = ".nii.gz" if source.dims == 3 else ".png"
        write_case = _write_volume if source.dims == 3 else _write_slice
        for split, (images, labels) in PLACES.items():
            if not source.counts[split]:
                continue
            (part / images).mkdir()
            (part / labels).mkdir()
            for name in source.names(split):
                case = source.read(split, name)
                write_case(case, part / images / f"{name}_0000{ending}", part / labels / f"{name}{ending}")
                advance()
        description = {
            "channel_names": {str(k): channel for k, channel in enumerate(source.modality)},
            "labels": {"background": 0} | {known.name: known.id for known in source.space.classes},
            "numTraining": source.counts["train"],
            "file_ending": ending,
            "name": folder.name,
            "description": "drawn from formulas by Perdure; no patient's data",
        }
        write_json(part / "dataset.json", description)
        part.rename(folder)
    except OSError as error:
        raise write_failure(folder, error) from error
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def _write_volume(case: Case, image: Path, label: Path) -> None:
    """NIfTI files with axes (x, y, z). No date goes into them: the same case gives the same bytes."""
    nibabel = need("nibabel")
    affine = np.array(case.geometry.affine).reshape(4, 4)
    for path, values in ((image, case.image[0].numpy().astype(np.int16)), (label, case.label.numpy().astype(np.uint8))):
        volume = nibabel.Nifti1Image(values.transpose(2, 1, 0), affine)
        volume.set_sform(affine, code="scanner")
        volume.set_qform(affine, code="scanner")
        volume.header.set_xyzt_units("mm")
        # level 6 of zlib: 9 takes twice as long for 1 % less
        path.write_bytes(gzip.compress(volume.to_bytes(), 6, mtime=0))


def _write_slice(case: Case, image: Path, label: Path) -> None:
    """PNG files. They hold no spacing, as everywhere in nnU-Net's folders of images."""
    from PIL import Image

    Image.fromarray(case.image[0].numpy()).save(image)
    Image.fromarray(case.label.numpy().astype(np.uint8)).save(label)
