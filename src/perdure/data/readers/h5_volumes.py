"""Volumes in HDF5 files with the keys ``image`` and ``label``, as the left atrium and ACDC are often passed on.

A case is called after its file, or after its folder where every folder holds one file. ``train.list`` and ``test.list``
(or ``.txt``), one case per line, divide them; without lists a fold does. Such files know no orientation: the axes are
taken as they are, see the option ``axes``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from perdure.data.case import Geometry
from perdure.data.readers.casefiles import (
    CaseFiles,
    alike_names,
    annotated_classes,
    class_list,
    patient_of,
    plain_labels,
)
from perdure.data.readers.classfile import find_class_file, read_class_file
from perdure.data.readers.folds import divided
from perdure.data.readers.imagefiles import sample_name
from perdure.data.readers.volumes import VolumeSource
from perdure.data.source import Image, Mask, Split, size_text
from perdure.data.volumes.extra import need
from perdure.data.volumes.files import read_image, read_voxels
from perdure.data.volumes.headers import Header
from perdure.errors import DataError, PerdureError
from perdure.files import refuse_special
from perdure.labels import LabelSpace

Axes = Literal["xyz", "zyx"]
KEYS: Final = ("image", "label")


@dataclass(frozen=True, eq=False)
class H5Volumes(VolumeSource):
    """Volumes whose image and mask are two arrays of one file.

    Args:
        axes: Order of the axes in the files.
        spacing: In their order, in mm; ``None`` where files tell it, or nobody does.
    """

    axes: Axes = "xyz"
    spacing: tuple[float, float, float] | None = None

    def image(self, split: Split, name: str) -> Image:
        """Image ``(1, D, H, W)`` float32. Damaged file: DataError."""
        return read_image(self._header(self.case(split, name).mask, "image"))

    def mask(self, split: Split, name: str) -> Mask:
        """Label map ``(D, H, W)`` int16 in class ids. See :meth:`VolumeSource.mask`."""
        path = self.case(split, name).mask
        image, mask = self._header(path, "image"), self._header(path, "label")
        if image.size != mask.size:
            sizes = f"image {size_text(image.turned)}, label {size_text(mask.turned)} voxels"
            raise DataError(
                f"{self.name}: image and label of '{name}' differ in size: {sizes} ({path})", "write it anew"
            )
        return self.class_ids(path, read_voxels(mask), name)

    def header(self, split: Split, name: str) -> Header:
        """Size and spacing of the image; these files know no place in the world."""
        return self._header(self.case(split, name).mask, "image")

    def mask_digest(self, split: Split, name: str) -> bytes:
        """Digest of the label array: the image in the same file does not count."""
        values = read_voxels(self._header(self.case(split, name).mask, "label"))
        return hashlib.blake2b(np.ascontiguousarray(values).data, digest_size=16).digest()

    def files(self, split: Split, name: str) -> Sequence[Path]:
        """The file."""
        return (self.case(split, name).mask,)

    def reading(self) -> bytes:
        """Also the order of the axes."""
        return super().reading() + self.axes.encode()

    def _header(self, path: Path, key: str) -> Header:
        """What a file says of one of its arrays."""
        with _opened(path) as file:
            stored = file[key]
            shape, width = tuple(map(int, stored.shape)), stored.dtype.itemsize
            told = next((x.attrs["spacing"] for x in (stored, file) if "spacing" in x.attrs), None)
            given = self.spacing if self.spacing is not None else told
            spacing = [1.0] * 3 if given is None else [*map(float, np.ravel(given))]
        if len(shape) != 3 or min(shape) < 1:
            what = f"'{key}' in {path} has the shape {'×'.join(map(str, shape)) or 'of a number'}"
            raise DataError(what, "three axes are expected: volumes, not slices")
        if len(spacing) != 3 or not (np.isfinite(spacing).all() and min(spacing) > 0):
            what = f"{path} has a voxel spacing of {'×'.join(f'{part:.4g}' for part in spacing)} mm"
            raise DataError(what, "three numbers above 0 are expected, in the order of the file's axes")

        def load() -> npt.NDArray[Any]:
            with _opened(path) as file:
                values: npt.NDArray[Any] = file[key][()]
            return values

        order = (2, 1, 0) if self.axes == "xyz" else (0, 1, 2)
        axes = tuple((axis, False) for axis in order)
        geometry = Geometry(tuple(spacing[axis] for axis in order), "px" if given is None else "mm", (), axes)
        count = int(np.prod(shape, dtype=object))
        return Header(path, (shape[0], shape[1], shape[2]), 0, geometry, count * (width + 4), load)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file that is open while it is read: handles that stay open do not survive worker processes."""
    h5py = need("h5py")
    refuse_special(path)
    try:
        with h5py.File(path, "r") as file:
            for key in KEYS:
                if not isinstance(file.get(key), h5py.Dataset):
                    raise DataError(
                        f"{path} has no array '{key}', only {', '.join(file) or 'nothing'}",
                        "expected the keys image and label",
                    )
            yield file
    except (PerdureError, MemoryError):
        raise
    except Exception as error:  # h5py has no exception of its own for damaged files
        what = f"{path} is not a readable HDF5 file: {' '.join(str(error).split())[:200]}"
        raise DataError(what, "the file is damaged or of another format: copy it again") from error


def open_h5_volumes(
    root: Path,
    classes: list[str] | None = None,
    axes: Axes = "xyz",
    spacing: tuple[float, float, float] | None = None,
    fold: int = 0,
    patients: bool = True,
) -> H5Volumes:
    """Open a folder of HDF5 files; they may lie in folders inside.

    Args:
        root: The folder.
        classes: Names of the labels 1, 2, ...; by default a class file in ``root`` gives them.
        axes: Order of the axes in the files: ``xyz``, slices last, or ``zyx``, slices first.
        spacing: Of the voxels in mm, in the order of the axes in the files. By default the attribute ``spacing`` of the
            file or of its image; 1 pixel where there is none.
        fold: Without ``train.list`` and ``test.list``: the fold whose validation cases are the test cases, from 0, as
            nnU-Net makes its five. With ``patients.json`` in ``root``, ``{case: patient}``, no patient is divided.
        patients: False if the images may be shown; otherwise a run stores no picture of them.

    Raises:
        DataError: There is no file, no class list, or a list names cases that are not there.
        UsageError: There is no such fold, or there are lists.
    """
    need("h5py")  # a missing package is told before any file
    space = _space(root, classes)
    files, problems = _found(root)
    cases = {name: CaseFiles((path,), path) for name, path in files.items()}
    patient = patient_of(root, cases, problems)
    aliases = {name: name for name in cases} | {path.relative_to(root).as_posix(): name for name, path in files.items()}
    layout = divided(root, (".list", ".txt"), cases, aliases, patient, fold, problems)
    return H5Volumes(
        "h5_volumes",
        root,
        space,
        layout,
        plain_labels(space),
        "add the class to classes, or correct the label",
        annotated=annotated_classes(root, cases, space, problems),
        groups=patient,
        patients=patients,
        axes=axes,
        spacing=spacing,
    )


def _space(root: Path, classes: Sequence[str] | None) -> LabelSpace:
    if classes is not None:
        return class_list(root, dict(enumerate(classes, 1)))
    path = find_class_file(root)
    if path is None:
        raise DataError(f"{root} does not say which classes its labels are", "classes=[NAME, ...], or a classes.txt")
    return read_class_file(path)


def _found(root: Path) -> tuple[dict[str, Path], list[DataError]]:
    """Files by the name of the case: of the file, of its folder, or the path inside ``root``."""
    paths = sorted(p for end in ("*.h5", "*.hdf5") for p in root.rglob(end) if not p.name.startswith("."))
    if not paths:
        raise DataError(f"{root} holds no .h5 file", "give the folder that holds them; folders inside are searched too")
    problems = []
    for path in paths:
        if path.is_symlink() and not path.exists():
            what = f"{path} is a link to {path.readlink()}, which does not exist"
            problems.append(DataError(what, "restore the file behind it, or remove the link"))
    there = [path for path in paths if path.exists()]
    namings = (
        [path.stem for path in there],
        [path.parent.name for path in there],
        [path.relative_to(root).with_suffix("").as_posix() for path in there],
    )
    names = next(naming for naming in namings if len(set(naming)) == len(there))
    for path, name in zip(there, names, strict=True):
        sample_name(path, name)
    return dict(zip(names, there, strict=True)), [*problems, *alike_names(names)]
