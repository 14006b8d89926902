"""Reading ``.npz`` files (zip archives of NumPy arrays) without pickle. Every defect of a file is a DataError."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from perdure.errors import DataError

_UNREADABLE: Final = (
    OSError, EOFError, ValueError, KeyError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip  # what zipfile and NumPy raise on damaged, encrypted and foreign archives


class Header(NamedTuple):
    """Shape, type and checksum (CRC-32 of its bytes) of an array, known before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    crc: int


def read_headers(path: Path) -> dict[str, Header]:
    """Header of every array of an archive; no array is read.

    Raises:
        DataError: The file is missing, damaged, or not an archive of arrays.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            headers = {info.filename.removesuffix(".npy"): _header(archive, info) for info in members}
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    if not headers:
        raise DataError(f"{path} holds no NumPy array", "expected an archive written by numpy.savez")
    return headers


def read_array(path: Path, key: str) -> npt.NDArray[Any]:
    """Read one array. Pickled objects are refused.

    Raises:
        DataError: The array is missing, damaged, contains Python objects, or does not fit into memory.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            array: npt.NDArray[Any] = archive[key]
    except MemoryError as error:
        raise DataError(f"'{key}' in {path} does not fit into memory", "choose a smaller image size") from error
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    return array


def _header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Header:
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"array '{info.filename}' has format version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
        size = stream.tell() + int(np.prod(shape, dtype=object)) * dtype.itemsize
    if not dtype.hasobject and size != info.file_size:
        raise ValueError(f"array '{info.filename}' should have {size} bytes and has {info.file_size}")
    return Header(shape, dtype, info.CRC)


def _unreadable(path: Path, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path} does not exist")
    why = (str(error) or type(error).__name__).splitlines()[0]
    return DataError(
        f"{path} is not a readable .npz file: {why}", "the file is damaged or of another type: download it again"
    )
