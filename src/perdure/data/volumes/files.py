"""One file of a volume: read with its axes turned to the house's orientation, and written with those of another file.

NIfTI files are read through nibabel, ``.mha``, ``.mhd`` and ``.nrrd`` through SimpleITK. The header is read first: it
says the shape and the place in the world, so that images and masks are compared, and a volume that does not fit into
memory is refused, before any voxel is decoded. Arrays are those of nnU-Net's ``NibabelIOWithReorient``.
"""

from __future__ import annotations

import functools
import gzip
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from perdure.data.case import Geometry
from perdure.data.source import size_text
from perdure.data.volumes.extra import need
from perdure.errors import DataError, PerdureError, UsageError
from perdure.files import refuse_special, write_atomic

ENDINGS: Final = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")
WRITTEN: Final = (".nii.gz", ".nii", ".mha", ".nrrd")
"""Endings that are written; ``.mhd`` is not, because it is two files, which cannot be replaced in one step."""
SKEW: Final = 1e-3
"""Cosine between two axes that still counts as a right angle: headers written as text are rounded."""
NEAR: Final = 1e-3
"""Differences of spacing (relative) and of direction (cosine) that are taken for rounding."""
_LPS: Final = np.diag([-1.0, -1.0, 1.0, 1.0])
"""ITK's axes run to the left and to posterior, those of NIfTI to the right and to anterior."""
_LOADING: Final = threading.Lock()
Voxels = npt.NDArray[Any]
Affine = npt.NDArray[np.float64]


@functools.cache
def library(name: str) -> Any:
    """A package of the extra. Files are read in many threads, and none of them must find it half imported."""
    with _LOADING:
        return need(name)


class Header(NamedTuple):
    """What a file says of its volume before a voxel is read.

    Args:
        path: The file.
        size: Voxels along the axes of the file.
        channels: Length of a fourth axis, the last one; 0 where there is none.
        geometry: Where the turned volume lies.
        memory: Bytes that are needed to read it as float32.
        load: Reads the voxels, ``size`` or ``(*size, channels)``, in the order and the type of the file.
    """

    path: Path
    size: tuple[int, int, int]
    channels: int
    geometry: Geometry
    memory: int
    load: Callable[[], Voxels]

    @property
    def turned(self) -> tuple[int, ...]:
        """Voxels along the axes of the turned volume, ``(D, H, W)``."""
        return tuple(self.size[axis] for axis, _ in self.geometry.axes)

    @property
    def orientation(self) -> str:
        """Where the axes of the file run to, such as ``LPS``."""
        letters = {axis: ("SAR", "IPL")[against][k] for k, (axis, against) in enumerate(self.geometry.axes)}
        return "".join(letters[axis] for axis in range(3))


def ending(path: Path) -> str:
    """The ending of a file of a volume, in small letters; empty for other files."""
    return next((end for end in ENDINGS if path.name.lower().endswith(end)), "")


def matrix(geometry: Geometry) -> Affine:
    """The affine as ``4 × 4`` numbers. Where a case has none: its axes along the world's, spacing as it is."""
    if geometry.affine:
        return np.asarray(geometry.affine, np.float64).reshape(4, 4)
    spacing = geometry.spacing or (1.0, 1.0, 1.0)
    stored = {axis: spacing[k] for k, (axis, _) in enumerate(_axes(geometry))}
    return np.diag([*(stored[axis] for axis in range(3)), 1.0])


def read_header(path: Path) -> Header:
    """Read what a file says of its volume.

    Raises:
        DataError: The file is missing, no volume, or damaged; its spacing is not above 0, its axes are not at right
            angles, or it has fewer than three or more than four axes.
        PerdureError: The extra ``volumes`` is not installed.
    """
    if not ending(path):
        raise DataError(f"{path} is not a volume that is read", f"expected a file ending in {', '.join(ENDINGS)}")
    refuse_special(path)
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path} is a link to {path.readlink()}, which does not exist", "restore the file behind it")
    if not path.is_file():
        raise DataError(f"{path} does not exist", "restore the file, or remove the case")
    with _explained(path):
        return _nifti_header(path) if ending(path).startswith(".nii") else _itk_header(path)


def read_voxels(header: Header) -> Voxels:
    """The volume ``(D, H, W)``, or ``(C, D, H, W)`` where it has channels: turned, contiguous, in the file's type.

    Raises:
        DataError: The file is damaged, or the volume does not fit into memory.
    """
    free = free_memory()
    if header.memory > free:
        raise DataError(
            f"{header.path} needs {header.memory / 2**30:.1f} GB of memory ({size_text(header.turned)} voxels), and "
            f"{free / 2**30:.1f} GB are free",
            "crop or resample it, or use a machine with more memory",
        )
    with _explained(header.path):
        return turn(header.load(), header.geometry)


def read_image(header: Header) -> npt.NDArray[np.float32]:
    """The volume as an image, ``(C, D, H, W)`` float32.

    Raises:
        DataError: As :func:`read_voxels`; or a voxel is NaN or infinite.
    """
    values = read_voxels(header)
    if values.dtype.kind not in "biuf":
        raise DataError(
            f"{header.path} holds voxels of type {values.dtype}, one number per voxel is expected",
            "save it as a volume of grey values",
        )
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, and that is told below
        image = np.asarray(values, np.float32)
    # NaN passes through min and max, so that no array of truth values is needed beside a large volume
    if not (np.isfinite(image.min()) and np.isfinite(image.max())):
        wrong = ~np.isfinite(image)
        raise DataError(
            f"{header.path} has NaN or infinite voxels: {np.count_nonzero(wrong)} of {wrong.size}, the first at "
            f"{_position(wrong)}",
            "replace them, for CT by -1024, for MR by 0",
        )
    return image if image.ndim == 4 else image[None]


def _position(wrong: npt.NDArray[np.bool_]) -> str:
    """Where the first voxel of a turned volume is that is wrong."""
    *_, z, y, x = map(int, np.argwhere(wrong)[0])
    return f"slice {z}, row {y}, column {x}"


def turn(values: Voxels, geometry: Geometry) -> Voxels:
    """Voxels in the order of the file -> ``(D, H, W)`` or ``(C, D, H, W)``, contiguous."""
    axes = _axes(geometry)
    turned = values.transpose(*([3] if values.ndim == 4 else []), *(axis for axis, _ in axes))
    reverse = tuple(turned.ndim - 3 + k for k, (_, against) in enumerate(axes) if against)
    return np.ascontiguousarray(np.flip(turned, reverse) if reverse else turned)


def turn_back(values: Voxels, geometry: Geometry) -> Voxels:
    """Voxels ``(D, H, W)`` -> in the order of the file."""
    axes = _axes(geometry)
    reverse = tuple(k for k, (_, against) in enumerate(axes) if against)
    return np.flip(values, reverse).transpose([[axis for axis, _ in axes].index(k) for k in range(3)])


def place(header: Header) -> Affine:
    """Indices of the *turned* volume ``(d, h, w)`` to millimetres in RAS, ``4 × 4``: equal for equal places."""
    affine = matrix(header.geometry)
    found = np.eye(4)
    found[:3, 3] = affine[:3, 3]
    for k, (axis, against) in enumerate(_axes(header.geometry)):
        found[:3, k] = -affine[:3, axis] if against else affine[:3, axis]
        if against:
            found[:3, 3] += affine[:3, axis] * (header.size[axis] - 1)
    return found


def difference(image: Header, mask: Header, words: tuple[str, str] = ("image", "mask")) -> str:
    """How the place of a mask differs from that of its image, in words; empty where both are the same.

    Files of unlike orientation that show the same voxels at the same places are the same. What differs by rounding is
    too: :data:`NEAR`, and for the position a hundredth of a voxel. ``words`` are what the two are called.
    """

    def beside(first: str, second: str) -> str:
        return f"{words[0]} {first}, {words[1]} {second}"

    unlike = f"orientation: {beside(image.orientation, mask.orientation)}"
    same_orientation = image.orientation == mask.orientation
    if image.turned != mask.turned:
        if image.size == mask.size and not same_orientation:
            return unlike
        return f"size: {beside(size_text(image.turned), size_text(mask.turned))} voxels"
    ours, theirs = place(image), place(mask)
    spacings = [np.sqrt((affine[:3, :3] ** 2).sum(0)) for affine in (ours, theirs)]
    if np.abs(spacings[1] / spacings[0] - 1).max() > NEAR:
        return f"spacing: {beside(_millimetres(image), _millimetres(mask))}"
    cosines = [affine[:3, :3] / spacing for affine, spacing in zip((ours, theirs), spacings, strict=True)]
    apart = np.abs(ours[:3, 3] - theirs[:3, 3]).max()
    turned, moved = np.abs(cosines[0] - cosines[1]).max() > NEAR, apart > max(NEAR, 0.01 * spacings[0].min())
    if (turned or moved) and not same_orientation:
        return unlike
    if turned:
        angle = np.degrees(np.arccos(np.clip((cosines[0] * cosines[1]).sum(0).min(), -1, 1)))
        return f"orientation: the axes of {' and '.join(words)} are {angle:.2g} degrees apart"
    return f"position: the first voxels of {' and '.join(words)} are {apart:.4g} mm apart" if moved else ""


def _millimetres(header: Header) -> str:
    return f"{'×'.join(f'{part:.4g}' for part in reversed(header.geometry.spacing))} mm"


def write_volume(path: Path, values: Voxels, affine: Affine) -> None:
    """Write a volume atomically; equal voxels give equal bytes.

    Args:
        path: The file; its ending, one of :data:`WRITTEN`, says the format.
        values: Voxels in the order of the file's axes, ``(X, Y, Z)``.
        affine: ``4 × 4``: voxel indices to millimetres in RAS.

    Raises:
        PerdureError: The disk is full, the folder cannot be written, or the extra ``volumes`` is not installed.
        UsageError: Files with this ending are not written.
    """
    end = ending(path)
    if end not in WRITTEN:
        raise UsageError(f"{path}: volumes are not written in this format", f"use one of {', '.join(WRITTEN)}")
    if end.startswith(".nii"):
        nib = library("nibabel")
        image = nib.Nifti1Image(values, affine)
        # both with the code of scanner coordinates: readers differ in which of the two they trust
        image.set_sform(affine, 1)
        image.set_qform(affine, 1)
        image.header.set_xyzt_units("mm")
        content: bytes = image.to_bytes()
        # without a time of writing in the header of the archive
        packed = gzip.compress(content, 6, mtime=0) if end == ".nii.gz" else content
        write_atomic(path, lambda part: part.write_bytes(packed))
        return
    sitk = library("SimpleITK")
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.transpose(2, 1, 0)))
    lps = _LPS @ affine
    spacing = np.sqrt((lps[:3, :3] ** 2).sum(0))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())

    def fill(part: Path) -> None:
        try:
            sitk.WriteImage(image, str(part), True)
        except RuntimeError as error:  # ITK tells a full disk like any other failure
            raise OSError(None, f"{_last_line(error)}; is the disk full?") from error

    write_atomic(path, fill)


def free_memory() -> int:
    """Bytes of memory that a program can have without swapping."""
    import psutil  # type: ignore[import-untyped]

    return int(psutil.virtual_memory().available)


def _axes(geometry: Geometry) -> tuple[tuple[int, bool], ...]:
    return geometry.axes or ((2, False), (1, False), (0, False))


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Whatever nibabel, ITK and zlib raise on a damaged file as a DataError; they have no common exception."""
    try:
        yield
    except PerdureError:
        raise
    except MemoryError as error:
        raise DataError(f"{path} does not fit into memory", "crop or resample it") from error
    except Exception as error:
        what = f"{path} is not a readable volume: {_last_line(error)}"
        raise DataError(what, "the file is damaged or of another format: copy it again") from error


def _last_line(error: Exception) -> str:
    """ITK writes its places in source files first and the reason last, but for one of the operating system's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Reason: ")]
    return re.sub(r"\(0x[0-9a-f]+\)", "", lines[-1])[:200] if lines else type(error).__name__


def _geometry(path: Path, affine: Affine) -> Geometry:
    """Geometry of a file. Raises DataError for spacings and axes that no volume has."""
    spacing = np.sqrt((affine[:3, :3] ** 2).sum(0))
    if not np.isfinite(affine).all() or spacing.min() <= 0:
        raise DataError(
            f"{path} has an affine that spans no volume: spacing {'×'.join(f'{part:.4g}' for part in spacing)} mm",
            "correct the header: three axes with a spacing above 0",
        )
    cosines = affine[:3, :3] / spacing
    skew = np.abs(cosines.T @ cosines - np.eye(3)).max()
    if skew > SKEW:
        raise DataError(
            f"{path} has axes that are not at right angles ({np.degrees(np.arccos(skew)):.4g} degrees), as from a "
            "tilted CT gantry",
            "resample it to a grid with right angles",
        )
    axes = _axes_along(tuple(map(float, affine[:3, :3].ravel())))
    return Geometry(tuple(float(spacing[axis]) for axis, _ in axes), "mm", tuple(map(float, affine.ravel())), axes)


@functools.lru_cache(256)
def _axes_along(directions: tuple[float, ...]) -> tuple[tuple[int, bool], ...]:
    """Axes of a geometry from the directions of an affine, as nibabel has them.

    Remembered, because it is half the time of a header, and the cases of a data set have a few directions.
    """
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(directions, (3, 3))
    # along each axis of the file: the axis of the world that it follows, 0 to 2, and 1 or -1 for the sense
    along = library("nibabel").io_orientation(affine)
    by_world = {int(world): (axis, bool(sense < 0)) for axis, (world, sense) in enumerate(along)}
    return tuple(by_world[world] for world in (2, 1, 0))


def companions(path: Path) -> list[Path]:
    """The files that belong to one: the voxels of a ``.mhd``, which holds a header only."""
    if ending(path) != ".mhd":
        return [path]
    try:
        found = re.search(r"^ElementDataFile = (\S.*)$", path.read_text(errors="replace")[: 1 << 16], re.MULTILINE)
    except OSError:
        return [path]
    return [path, path.parent / found[1].strip()] if found and found[1] not in ("LOCAL", "LIST") else [path]


def _header(path: Path, shape: tuple[int, ...], affine: Affine, width: int, load: Callable[[], Voxels]) -> Header:
    """Header of a file with voxels of ``width`` bytes."""
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise DataError(
            f"{path} has the shape {'×'.join(map(str, shape)) or 'of a point'}, and three axes are expected",
            "save every volume in a file of its own",
        )
    x, y, z, *channels = shape
    count = int(np.prod(shape, dtype=object))
    geometry = _geometry(path, affine)

    def voxels() -> Voxels:
        return load().reshape(shape)

    return Header(path, (x, y, z), channels[0] if channels else 0, geometry, count * (width + 4), voxels)


def _nifti_header(path: Path) -> Header:
    """Header of a NIfTI file, without nibabel's silent repairs: it makes negative spacings positive and zero 1."""
    nib = library("nibabel")
    with gzip.open(path) if ending(path) == ".nii.gz" else path.open("rb") as stream:
        start = stream.read(540)
    kinds = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
    size = next((n for n in kinds if start[:4] in (n.to_bytes(4, "little"), n.to_bytes(4, "big"))), 0)
    if not size or len(start) < size:
        raise DataError(f"{path} is no NIfTI file", "the file is damaged or of another format: copy it again")
    header = kinds[size](start[:size], check=False)
    if not bytes(header["magic"]).startswith(b"n+"):
        raise DataError(f"{path} holds a header without voxels", "save image and header as one .nii.gz file")
    shape = tuple(map(int, header.get_data_shape()))
    spacing = np.asarray(header["pixdim"][1:4], np.float64)
    if not (np.isfinite(spacing).all() and spacing.min() > 0):
        raise DataError(
            f"{path} has a voxel spacing of {'×'.join(f'{part:.4g}' for part in spacing)} mm",
            "correct the header: spacings must be above 0",
        )
    affine = np.asarray(header.get_best_affine(), np.float64)
    kind = header.get_data_dtype()
    scaled = header.get_slope_inter() not in ((1.0, 0.0), (None, None))

    def load() -> Voxels:
        with gzip.open(path) if ending(path) == ".nii.gz" else path.open("rb") as stream:
            # an array proxy of the header that was read, because loading the file by its name repairs and prints
            values: Voxels = np.asanyarray(nib.arrayproxy.ArrayProxy(stream, header, mmap=False))
            while stream.read(1 << 20):  # to the end, where the check sum of an archive stands: it is read only once
                pass
        return values

    return _header(path, shape, affine, 8 if scaled else kind.itemsize, load)


def _itk_header(path: Path) -> Header:
    """Header of a file that SimpleITK reads."""
    sitk = library("SimpleITK")
    sitk.ProcessObject.GlobalWarningDisplayOff()  # or ITK writes lines of its own about what is told below
    if ending(path) in (".mha", ".mhd"):
        _refuse_meta(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    dims, size, spacing = reader.GetDimension(), reader.GetSize(), np.asarray(reader.GetSpacing())
    if not (np.isfinite(spacing).all() and spacing.min() > 0):
        raise DataError(
            f"{path} has a voxel spacing of {'×'.join(f'{part:.4g}' for part in spacing)} mm",
            "correct the header: spacings must be above 0",
        )
    if dims not in (3, 4) or reader.GetNumberOfComponents() > 1:
        parts = reader.GetNumberOfComponents()
        what = f"{dims} axes" if parts == 1 else f"{parts} numbers per voxel"
        raise DataError(f"{path} has {what}, and three axes of single numbers are expected", "save it as one volume")
    lps = np.eye(4)
    lps[:3, :3] = np.asarray(reader.GetDirection()).reshape(dims, dims)[:3, :3] * spacing[:3]
    lps[:3, 3] = reader.GetOrigin()[:3]
    name = sitk.GetPixelIDValueAsString(reader.GetPixelIDValue())  # such as "16-bit signed integer"
    width = int(name.split("-")[0]) // 8 if name.split("-")[0].isdigit() else 8
    _refuse_cut(path, int(np.prod(size, dtype=object)) * width)

    def load() -> Voxels:
        image = sitk.ReadImage(str(path))
        values: Voxels = sitk.GetArrayFromImage(image)
        return values.transpose(*reversed(range(values.ndim)))

    return _header(path, tuple(size), _LPS @ lps, width, load)


def _refuse_meta(path: Path) -> None:
    """Refuse a MetaImage with an impossible number of axes: ITK would end the whole program with it."""
    with path.open("rb") as stream:
        start = stream.read(1 << 12)
    axes = re.search(rb"^NDims *= *(\S+)", start, re.MULTILINE)
    for key in (b"DimSize", b"ElementSpacing", b"Offset"):
        values = re.search(rb"^" + key + rb" *= *([^\n]*)", start, re.MULTILINE)
        if axes is None or axes[1] not in (b"2", b"3", b"4") or (values and len(values[1].split()) != int(axes[1])):
            raise DataError(
                f"{path} is not a readable volume: its header does not give the number of axes",
                "the file is damaged or of another format: copy it again",
            )


def _refuse_cut(path: Path, needed: int) -> None:
    """Refuse a truncated ``.mha`` file before ITK prints lines of its own about it."""
    if ending(path) != ".mha":
        return
    with path.open("rb") as stream:
        start = stream.read(1 << 12)
    begins = start.find(b"\n", start.find(b"ElementDataFile = LOCAL")) + 1
    if b"CompressedData = True" not in start and path.stat().st_size < begins + needed:
        raise DataError(
            f"{path} is not a readable volume: it has {path.stat().st_size} bytes of {begins + needed}",
            "the file is damaged: copy it again",
        )
