"""Reading image and mask files. Every defect of a file is a DataError that names the file and the remedy."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image as Pil

from perdure.errors import DataError

IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
MASK_SUFFIXES: Final = (".png", ".bmp", ".tif", ".tiff")
_UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Pil.DecompressionBombError,
)  # fmt: skip  # what Pillow's decoders raise on damaged files
_MOST: Final = 65535  # of a 16-bit grey image
_EIGHT_BIT = {"1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV"}


def _load(path: Path) -> Pil.Image:
    try:
        with Pil.open(path) as picture:
            picture.load()
            return picture
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist", "restore the file, or remove its name from the list") from error
    except _UNREADABLE as error:
        raise DataError(
            f"{path} is not a readable image: {error}", "the file is damaged or not an image: copy it again"
        ) from error


def read_image(path: Path) -> npt.NDArray[np.uint8]:
    """Read a photograph as RGB ``(3, H, W)`` uint8; grey and palette images become RGB.

    The pixels are returned as stored. A rotation flag of the camera is not applied, because the masks of published data
    sets refer to the stored pixels.

    Raises:
        DataError: The file is missing or damaged, has more than 8 bits per channel, or has transparent pixels
            (their colour is undefined).
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
        DataError: The file is missing or damaged, is a colour image, or holds numbers above 65535.
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
