"""Reading image and mask files. Every defect of a file is a DataError that names the file and the remedy."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image as Pil
from PIL import ImageOps

from perdure.errors import DataError, odd, plain
from perdure.files import refuse_special

IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
MASK_SUFFIXES: Final = (".png", ".bmp", ".tif", ".tiff")
_UNREADABLE = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error, zlib.error,
)  # fmt: skip  # what Pillow's decoders raise on damaged files
_MOST: Final = 65535  # of a 16-bit grey image
ORIENTATION: Final = 0x0112
"""Number of the EXIF entry that says how a photograph has to be turned; 1 is upright."""
_EIGHT_BIT = {"1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV"}


def _load(path: Path) -> Pil.Image:
    """Read one picture, turned upright as its EXIF flag says: labelling tools and viewers show it so."""
    refuse_special(path)
    try:
        with Pil.open(path) as picture:
            pages = getattr(picture, "n_frames", 1)
            # phones write a JPEG with a preview or a depth map behind the photograph (MPO): its first picture is meant
            if pages > 1 and picture.format != "MPO":
                raise DataError(
                    f"{path} holds {pages} pictures, and one is expected",
                    "save every page or frame in a file of its own",
                )
            picture.load()
            # asked first: to turn a picture rewrites all its EXIF data, which fails on many that are slightly wrong
            return picture if picture.getexif().get(ORIENTATION, 1) in (0, 1) else ImageOps.exif_transpose(picture)
    except Pil.DecompressionBombError as error:
        most = 2 * (Pil.MAX_IMAGE_PIXELS or 0) // 1_000_000
        raise DataError(
            f"{path} has more than {most} million pixels, or says so to fill the memory",
            "cut it into smaller images",
        ) from error
    except MemoryError as error:
        raise DataError(f"{path} does not fit into memory", "cut it into smaller images") from error
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist", "restore the file, or remove its name from the list") from error
    except _UNREADABLE as error:
        raise DataError(
            f"{path} is not a readable image: {error}", "the file is damaged or not an image: copy it again"
        ) from error


def read_image(path: Path) -> npt.NDArray[np.uint8]:
    """Read a photograph as RGB ``(3, H, W)`` uint8; grey and palette images become RGB.

    A photograph with a rotation flag (EXIF) is turned upright, in training and in prediction.

    Raises:
        DataError: The file is missing or damaged, holds several pictures, has more than 8 bits per channel, or has
            transparent pixels (their colour is undefined).
    """
    picture = _load(path)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        if np.asarray(picture.getchannel("A")).min() < 255:
            raise DataError(f"{path} has transparent pixels", "save it without an alpha channel")
    elif picture.mode not in _EIGHT_BIT:
        raise DataError(
            f"{path} has pixel format {picture.mode}, not 8 bits per channel", "convert it to 8-bit RGB or grey"
        )
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB")).transpose(2, 0, 1)


def to_grey(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Luma (ITU-R 601) of an RGB image: ``(3, H, W)`` uint8 -> ``(1, H, W)``."""
    return np.array(Pil.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).convert("L"))[None]


def read_index_mask(path: Path) -> npt.NDArray[np.uint8 | np.uint16]:
    """Read a mask of class numbers ``(H, W)`` uint8 or uint16: palette indices or grey values, as stored.

    Raises:
        DataError: The file is missing or damaged, holds several pictures, is a colour image, or holds numbers above
            65535.
    """
    picture = _load(path)
    if picture.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
        what = "an image of fractions" if picture.mode == "F" else "a colour image"
        raise DataError(
            f"{path} is {what} (format {picture.mode}) where a mask of class numbers is expected",
            "save masks as palette or grey PNG whose pixel values are class numbers",
        )
    values = np.asarray(picture)
    if values.dtype in (np.uint8, np.bool_):
        return values.view(np.uint8)
    if values.itemsize > 2:  # Pillow gives 16-bit files of some kinds as int32, as it gives all wider ones
        wrong = values[(values < 0) | (values > _MOST)]
        if wrong.size:
            raise DataError(f"{path} holds label {wrong[0]}; labels run from 0 to {_MOST}", "renumber the classes")
    return values.astype(np.uint16, copy=False)  # also to the machine's byte order


def sample_name(file: Path, name: str) -> str:
    """A name taken from a file, checked. Raises DataError where lists and tables cannot hold it as text."""
    if any(map(odd, name)):
        raise DataError(
            f"the name of {plain(str(file))} is not plain UTF-8 text", "rename the file: without control characters"
        )
    return name


def file_size_and_time(path: Path) -> tuple[str, int, int]:
    """Whole path, bytes and time of the last change of a file (0 where it is missing): differs where it was changed."""
    try:
        found = path.stat()
    except OSError:
        return os.path.abspath(path), -1, 0  # noqa: PTH100  # a link keeps its own name
    return os.path.abspath(path), found.st_size, found.st_mtime_ns  # noqa: PTH100
