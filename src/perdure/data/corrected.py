"""Corrected copies of masks that lie elsewhere than their images, or whose numbers are stored as fractions."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from perdure.data.readers.casefiles import CaseFiles
from perdure.data.readers.volumes import VolumeSource
from perdure.data.source import Source
from perdure.data.validation import HeldOut
from perdure.data.volumes.files import WRITTEN, ending, read_header, read_voxels, write_volume
from perdure.data.volumes.headers import Voxels, difference, matrix, turn_back
from perdure.errors import DataError, UsageError
from perdure.files import TEMPORARY, write_failure


@dataclass(frozen=True)
class Corrections:
    """What :func:`write_corrected` did: by case, what was changed, and why a mask could not be corrected."""

    changed: dict[str, str]
    failed: dict[str, str]
    unchanged: int


def write_corrected(source: Source, folder: Path, advance: Callable[[], None] | None = None) -> Corrections:
    """Write a copy of all masks of a data set of volumes; the data set itself stays as it is.

    A mask comes out on the grid of its image, in whole numbers: one of another orientation is turned, and one that has
    the image's shape and another place is taken to belong to it voxel by voxel. What needs no change is copied byte for
    byte. Masks that cannot be corrected are not written.

    Args:
        source: The data set.
        folder: A new folder. Files have the same places in it as in the data set.
        advance: Called after each case, for a progress bar.

    Raises:
        DataError: A case lacks a file.
        UsageError: The folder is not new or lies in the data set, or the data set is none of volume files.
        PerdureError: The disk is full or the folder cannot be written.
    """
    source = source.inner if isinstance(source, HeldOut) else source
    if not isinstance(source, VolumeSource) or source.dims == 2 or not _is_placed(source):
        raise UsageError(
            f"'{source.name}' has no files with a place in the world to correct",
            "--fix is for nnunet, decathlon and nifti_folders with volumes",
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already", "give a new folder: nothing is written over")
    source.names("train")  # a mask without an image has no grid to come out on
    root = source.root.resolve()
    if folder.resolve() == root or root in folder.resolve().parents:
        raise UsageError(f"{folder} is in the data set {source.root}", "give a folder outside of it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder.parent))
    except OSError as error:
        raise write_failure(folder, error) from error
    changed: dict[str, str] = {}
    failed: dict[str, str] = {}
    unchanged = 0
    try:
        for cases in source.layout.splits.values():
            for name, files in sorted(cases.items()):
                inside = files.mask.resolve().is_relative_to(root)
                target = part / (files.mask.resolve().relative_to(root) if inside else files.mask.name)
                try:
                    what = _correct(files, target)
                except DataError as error:
                    failed[name] = error.what
                else:
                    changed |= {name: what} if what else {}
                    unchanged += not what
                if advance is not None:
                    advance()
        part.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        part.rename(folder)  # only now, so that a folder with this name is always whole
    except OSError as error:
        raise write_failure(folder, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Corrections(changed, failed, unchanged)


def _is_placed(source: VolumeSource) -> bool:
    return all(ending(files.mask) for cases in source.layout.splits.values() for files in cases.values())


def _correct(files: CaseFiles, target: Path) -> str:
    """Write one mask; returns what was changed, empty for nothing. Raises DataError where it cannot be corrected."""
    image, mask = read_header(files.images[0]), read_header(files.mask)
    if mask.channels:
        raise DataError(f"{mask.path} has 4 axes")
    changes = []
    what = difference(image, mask)
    if what and image.size != mask.size:
        raise DataError(f"image and mask differ in {what}")
    if what:
        changes.append(f"{what}; now that of the image")
        mask = mask._replace(geometry=image.geometry)
    elif image.orientation != mask.orientation:
        changes.append(f"orientation {mask.orientation} turned to {image.orientation}, as the image")
    values = read_voxels(mask)
    if values.dtype.kind == "f":
        values = _whole(values, files.mask)
        changes.append("whole numbers stored as fractions are now integers")
    if not changes:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(files.mask, target)
        return ""
    if ending(files.mask) not in WRITTEN:
        raise DataError(f"{files.mask} ends in {ending(files.mask)}, and {', '.join(WRITTEN)} can be written")
    write_volume(target, turn_back(values, image.geometry), matrix(image.geometry))
    return "; ".join(changes)


def _whole(values: Voxels, path: Path) -> Voxels:
    """Integers of the smallest type that holds them."""
    if not np.isfinite(values).all() or (np.rint(values) != values).any():
        raise DataError(f"{path} holds fractions")
    return values.astype(np.result_type(np.min_scalar_type(int(values.min())), np.min_scalar_type(int(values.max()))))
