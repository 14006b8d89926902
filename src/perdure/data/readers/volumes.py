"""Data sets of volumes: the one reader of all layouts of volumes.

A layout provides only data: the files of each case, a label space, and a table from the numbers in masks to class ids.
Two optional files beside any of them say more of the cases: ``annotated.json``, ``{case: [class names]}``, which
classes a case labels (all, where it is not listed), and ``patients.json``, ``{case: patient}``, which of them are one
patient's. How cases become training and test cases: :mod:`perdure.data.readers.folds`.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from perdure.data.case import Case, Geometry
from perdure.data.readers.casefiles import PATIENTS, CaseFiles, Layout
from perdure.data.readers.imagefiles import read_image as read_picture
from perdure.data.readers.imagefiles import read_index_mask, to_grey
from perdure.data.readers.pairs import PairingError
from perdure.data.source import Image, Kind, Mask, Source, Split, UnknownLabelError, distinct, no_validation
from perdure.data.volumes.files import companions, read_header, read_image, read_voxels
from perdure.data.volumes.headers import Header, difference
from perdure.errors import DataError
from perdure.files import refuse_special
from perdure.labels import BACKGROUND, IGNORE, LabelSpace

PICTURES: Final = (".png", ".bmp", ".tif", ".tiff")
"""Endings of cases that are images, not volumes."""
LARGEST: Final = (1 << 16) - 1
"""Largest number in a mask that can have a meaning."""
_LONG: Final = 20
"""Voxels so many times as long as wide are told: such a header is often wrong."""
_SMALL: Final = 1e-3
"""In mm: whoever has smaller voxels often wrote another unit."""
_MANY: Final = 50
"""So many numbers without a meaning are not labels: the file is an image."""


@dataclass(frozen=True, eq=False)
class VolumeSource(Source):
    """Volumes with masks of class numbers; implements :class:`~perdure.data.source.Source`.

    An image is ``(C, D, H, W)`` float32 and a mask ``(D, H, W)``, their axes turned as :class:`Geometry` has it. In
    nnU-Net's data sets of pictures they are ``(C, H, W)`` uint8 and ``(H, W)``.

    Args:
        name: Short name of the data set.
        root: Its folder, for messages.
        space: Its classes.
        layout: Its cases.
        table: Number in a mask -> class id, 0 or ``IGNORE``.
        remedy: Hint of the error for a number that ``table`` does not list.
        channels: Channels of every image; they are files of their own, or the last axis of a file.
        modality: See :class:`~perdure.data.source.Source`.
        annotated: Ids that a case labels, where it is not all of them.
        groups: Patient of each case; empty where every case is a patient's only one.
        patients: See :class:`~perdure.data.source.Source`.
        dims: 2 for pictures.
    """

    name: str
    root: Path
    space: LabelSpace
    layout: Layout
    table: Mapping[int, int]
    remedy: str
    channels: int = 1
    modality: tuple[str, ...] = ()
    annotated: Mapping[str, frozenset[int]] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)
    patients: bool = True
    dims: Literal[2, 3] = 3
    other_label: int = field(default=BACKGROUND, init=False)
    kind: Kind = field(default="segmentation", init=False)

    def names(self, split: Split) -> Sequence[str]:
        """Names of the cases, sorted. Raises DataError if a case lacks a file."""
        if self.layout.problems:
            raise PairingError.of(self.layout.problems, {})
        return self._sound(split)

    def listing(self, split: Split) -> tuple[Sequence[str], Sequence[DataError]]:
        """Cases with all their files, and what is wrong with the others."""
        return self._sound(split), self.layout.problems

    def _sound(self, split: Split) -> Sequence[str]:
        if split not in self.layout.splits:
            raise no_validation(str(self.root), "all cases are for training or testing")
        return tuple(sorted(self.layout.splits[split]))

    def image(self, split: Split, name: str) -> Image:
        """Image ``(C, D, H, W)`` float32. Damaged files, and channels that do not fit together: DataError."""
        images = self.case(split, name).images
        if self.dims == 2:
            pictures = [read_picture(path) for path in images]
            colour = len(pictures) == 1 and self.channels == 3
            return pictures[0] if colour else np.concatenate([to_grey(picture) for picture in pictures])
        headers = [read_header(path) for path in images]
        if math.prod(headers[0].size) == 1:
            raise DataError(
                f"{headers[0].path} is a volume of 1×1×1 voxels, in which there is nothing to see",
                "restore the file, or remove the case",
            )
        for number, header in enumerate(headers):
            self._refuse_axes(header, self.channels if len(headers) == 1 else 1)
            if what := difference(headers[0], header, ("channel 0", f"channel {number}")):
                raise DataError(
                    f"{self.name}: the channels of '{name}' differ in {what} ({headers[0].path}, {header.path})",
                    "resample them to one grid",
                )
        parts = [read_image(header) for header in headers]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def mask(self, split: Split, name: str) -> Mask:
        """Label map ``(D, H, W)`` int16 in class ids.

        Raises:
            DataError: The file is damaged, lies elsewhere than the image, or holds numbers that are not whole.
            UnknownLabelError: It holds a number without a meaning.
        """
        files = self.case(split, name)
        if self.dims == 2:
            return self.class_ids(files.mask, read_index_mask(files.mask), name)
        image, mask = read_header(files.images[0]), read_header(files.mask)
        self._refuse_axes(mask, 1)
        if what := difference(image, mask):
            raise DataError(
                f"{self.name}: image and mask of '{name}' differ in {what} (image {image.path}, mask {mask.path})",
                "make the mask on the image's grid"
                if image.size != mask.size
                else "if their voxels belong together all the same, this writes corrected masks to a new folder: "
                f"perdure check {self.name} {self.root} --fix DIR",
            )
        return self.class_ids(mask.path, read_voxels(mask), name)

    def _refuse_axes(self, header: Header, channels: int) -> None:
        found = header.channels or 1
        if found == channels:
            return
        what = f"has {found} volumes (4 axes)" if found > 1 else "has one channel"
        raise DataError(
            f"{header.path} {what}, and {channels if channels > 1 else 'one volume (3 axes)'} expected",
            "save every channel or time step in a file of its own"
            if channels == 1
            else "correct the file or the list of channels",
        )

    def class_ids(self, path: Path, values: npt.NDArray[Any], name: str) -> Mask:
        """Numbers of a mask of any shape and type as class ids, int16, checked."""
        if values.dtype.kind not in "biuf":
            raise DataError(f"{path} holds voxels of type {values.dtype}", "save masks as whole numbers")
        found = distinct(values)
        if values.dtype.kind == "f" and not (wrong := np.isfinite(found) & (np.rint(found) == found)).all():
            raise DataError(
                f"{path} holds {found[~wrong][0]:g} where a class number is expected",
                "a mask that was resampled or scaled holds fractions: make it again with nearest neighbours",
            )
        numbers = np.unique(found)
        unknown = [int(number) for number in numbers if int(number) not in self.table]
        if len(unknown) > _MANY:
            raise DataError(
                f"{path} holds {len(numbers):,} different numbers from {numbers[0]:g} to {numbers[-1]:g}, no labels",
                "it looks like an image: put the mask in its place",
            )
        if unknown:
            wrong = np.isin(values, unknown)
            *slices, row, column = map(int, np.argwhere(wrong)[0])
            where = ", ".join([*(f"slice {k}" for k in slices), f"row {row}", f"column {column}"])
            raise UnknownLabelError(
                f"{path} has label {unknown[0]} ({where}; {np.count_nonzero(wrong)} voxels are outside the class list)"
                if self.dims == 3
                else f"{path} has label {unknown[0]} ({where})",
                self.remedy.replace("LABEL", str(unknown[0])),
                tuple(unknown),
            )
        meanings = {int(number): self.table[int(number)] for number in numbers}
        self._refuse_unannotated(path, name, frozenset(meanings.values()))
        if all(number == meaning for number, meaning in meanings.items()):
            return values.astype(np.int16)
        look_up = np.zeros(LARGEST + 1, np.int16)
        look_up[list(meanings)] = list(meanings.values())
        return look_up.take(values.astype(np.uint16))

    def _refuse_unannotated(self, path: Path, name: str, shown: frozenset[int]) -> None:
        if name in self.annotated and (extra := shown - self.annotated[name] - {BACKGROUND, IGNORE}):
            first = self.space.name(min(extra))
            raise DataError(
                f"{path} shows '{first}', which annotated.json does not list for '{name}'",
                "add the class there, or correct the mask",
            )

    def geometry(self, split: Split, name: str) -> Geometry:
        """Where the voxels of a case lie; of a picture, nothing is known."""
        return Geometry() if self.dims == 2 else self.header(split, name).geometry

    def header(self, split: Split, name: str) -> Header:
        """What the file of a volume's first channel says."""
        return read_header(self.case(split, name).images[0])

    def group(self, split: Split, name: str) -> str:  # noqa: ARG002
        """The patient, if ``patients.json`` tells it."""
        return self.groups.get(name, name)

    def read(self, split: Split, name: str) -> Case:
        """One case with its geometry, its patient and the classes that it annotates."""
        case = super().read(split, name)
        return replace(case, geometry=self.geometry(split, name), annotated=self.annotated.get(name))

    def fingerprint(self, split: Split) -> str:
        """BLAKE2 digest of class ids, decoding, names, annotated classes and the bytes of every mask file."""
        names = self.names(split)
        digest = hashlib.blake2b(self.reading(), digest_size=16)
        with ThreadPoolExecutor() as pool:  # reading and hashing release the GIL
            for name, part in zip(names, pool.map(lambda name: self.mask_digest(split, name), names), strict=True):
                digest.update(name.encode() + b"\0" + part + repr(sorted(self.annotated.get(name, ()))).encode())
        return digest.hexdigest()

    def mask_digest(self, split: Split, name: str) -> bytes:
        """Digest of the mask of a case as it is stored."""
        digest = hashlib.blake2b(digest_size=16)
        for path in companions(self.case(split, name).mask):
            refuse_special(path)
            try:
                digest.update(path.read_bytes())
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}", "restore the file") from error
        return digest.digest()

    def files(self, split: Split, name: str) -> Sequence[Path]:
        """Every channel and the mask."""
        images, mask = self.case(split, name)
        return tuple(file for path in (*images, mask) for file in companions(path))

    def reading(self) -> bytes:
        """Also the meaning of the numbers in masks, the channels and what cases annotate."""
        annotated = sorted((name, sorted(ids)) for name, ids in self.annotated.items())
        return super().reading() + repr((sorted(self.table.items()), self.channels, annotated)).encode()

    def case(self, split: Split, name: str) -> CaseFiles:
        """Files of a case. Raises DataError where the split has no such case."""
        try:
            return self.layout.splits[split][name]
        except KeyError:
            raise DataError(f"{self.name} has no case '{name}' in split '{split}'") from None


def told_of_volumes(source: VolumeSource) -> list[str]:
    """What a check says of spacings and orientations besides the sizes; damaged files are told elsewhere."""
    spacings: dict[tuple[float, ...], str] = {}
    orientations: Counter[str] = Counter()
    thin: list[str] = []
    for split, cases in source.layout.splits.items():
        for name in cases:
            try:
                header = source.header(split, name)
            except DataError:
                continue
            spacings.setdefault(header.geometry.spacing, name)
            if header.geometry.affine:
                orientations[header.orientation] += 1
            thin += [name] if min(header.size) == 1 else []
    if not spacings:
        return []
    low, high = min(spacings, key=np.prod), max(spacings, key=np.prod)
    unit = "mm" if orientations else "in the files' units"
    lines = [f"voxel spacing {' to '.join(dict.fromkeys((_by(low), _by(high))))} {unit} (x×y×z)"]
    if len(orientations) > 1:
        counted = ", ".join(f"{count} {code}" for code, count in orientations.most_common())
        lines.append(f"files of several orientations: {counted}; all are read alike")
    lines += [
        f"'{name}' has voxels of {_by(spacing)} mm: is that its spacing?"
        for spacing, name in spacings.items()
        if max(spacing) > _LONG * min(spacing) or (min(spacing) < _SMALL and unit == "mm")
    ][:3]
    if thin:
        many = f"{len(thin)} cases are" if len(thin) > 1 else "1 case is"
        lines.append(
            f"{many} one voxel thick (first: '{thin[0]}'): networks for volumes need more; volumes.view=slices"
        )
    return lines


def _by(spacing: Sequence[float]) -> str:
    return "×".join(f"{part:.4g}" for part in reversed(spacing))


def told_of_patients(source: VolumeSource) -> list[str]:
    """What a check says of the patients that the cases are of; nothing where there are none."""
    cases = [name for names in source.layout.splits.values() for name in names]
    if not source.groups:
        return [f"there is no {PATIENTS}: every case counts as a patient of its own"] if source.patients else []
    patients = Counter(source.groups.get(name, name) for name in cases)
    most = max(patients.values(), default=0)
    return [f"{PATIENTS}: {len(cases)} cases of {len(patients)} patients, at most {most} of one; none is divided"]
