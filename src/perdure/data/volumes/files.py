"""One file of a volume: read with its axes turned to the house's orientation, and written with those of another file.

NIfTI files are read through nibabel, ``.mha``, ``.mhd`` and ``.nrrd`` through SimpleITK. The header is read first: it
says the shape and the place in the world, so that images and masks are compared, and a volume that does not fit into
memory is refused, before any voxel is decoded. Arrays are those of nnU-Net's ``NibabelIOWithReorient``.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from perdure.data.source import size_text
from perdure.data.volumes.extra import free_memory, need
from perdure.data.volumes.headers import Affine, Header, Voxels, header_of, turn
from perdure.errors import DataError, PerdureError, UsageError
from perdure.files import refuse_special, write_atomic

ENDINGS: Final = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")
WRITTEN: Final = (".nii.gz", ".nii", ".mha", ".nrrd")
"""Endings that are written; ``.mhd`` is not, because it is two files, which cannot be replaced in one step."""
_LPS: Final = np.diag([-1.0, -1.0, 1.0, 1.0])
"""ITK's axes run to the left and to posterior, those of NIfTI to the right and to anterior."""


def ending(path: Path) -> str:
    """The ending of a file of a volume, in small letters; empty for other files."""
    return next((end for end in ENDINGS if path.name.lower().endswith(end)), "")


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
    if path.is_dir():
        raise DataError(f"{path} is a folder, and a file is expected", "put the file in its place")
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
        nib = need("nibabel")
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
    sitk = need("SimpleITK")
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


def companions(path: Path) -> list[Path]:
    """The files that belong to one: the voxels of a ``.mhd``, which holds a header only."""
    if ending(path) != ".mhd":
        return [path]
    try:
        found = re.search(r"^ElementDataFile = (\S.*)$", path.read_text(errors="replace")[: 1 << 16], re.MULTILINE)
    except OSError:
        return [path]
    return [path, path.parent / found[1].strip()] if found and found[1] not in ("LOCAL", "LIST") else [path]


def _nifti_header(path: Path) -> Header:
    """Header of a NIfTI file, without nibabel's silent repairs: it makes negative spacings positive and zero 1."""
    nib = need("nibabel")
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

    return header_of(path, shape, affine, 8 if scaled else kind.itemsize, load)


def _itk_header(path: Path) -> Header:
    """Header of a file that SimpleITK reads."""
    sitk = need("SimpleITK")
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

    return header_of(path, tuple(size), _LPS @ lps, width, load)


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
