"""A few test samples after each task: pictures of image, ground truth and prediction, or an image and two classes."""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from perdure.errors import DataError
from perdure.files import read_json, write_atomic, write_json
from perdure.labels import TABLE_SIZE, Palette

if TYPE_CHECKING:
    from torch import Tensor

PARTS: Final = ("image", "truth", "pred")
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class SampleFiles:
    """The three pictures of one sample."""

    name: str
    image: Path
    truth: Path
    pred: Path


@dataclass(frozen=True, slots=True)
class ClassSample:
    """One sample whose image has one class: the picture, the id of its class and the id that was predicted."""

    name: str
    image: Path
    truth: int
    predicted: int


Sample = SampleFiles | ClassSample


def write_samples(
    folder: Path,
    name: str,
    image: Tensor,
    truth: npt.NDArray[Any],
    prediction: npt.NDArray[Any],
    palette: Palette,
) -> list[Path]:
    """Write ``NAME.image.png``, ``NAME.truth.png`` and ``NAME.pred.png``; of a volume, its middle slice.

    Args:
        folder: Where to write.
        name: The sample's name; characters that do not belong in a file name are replaced.
        image: Raw image ``(C, *S)``: uint8, or float whose range becomes black to white.
        truth: Labels ``(*S)`` in global ids, ``IGNORE`` included.
        prediction: Labels ``(*S)`` in global ids.
        palette: RGB of each label, ``(TABLE_SIZE, 3)`` uint8.

    Raises:
        DataError: The shapes of image, truth and prediction do not fit each other.
    """
    shape = tuple(image.shape[1:])
    if truth.shape != shape or prediction.shape != shape or len(shape) not in (2, 3):
        raise DataError(
            f"sample '{name}': image {tuple(image.shape)}, ground truth {truth.shape} and "
            f"prediction {prediction.shape} do not fit each other"
        )
    pixels = image.numpy()
    if len(shape) == 3:
        middle = shape[0] // 2
        pixels, truth, prediction = pixels[:, middle], truth[middle], prediction[middle]
    pictures = (to_rgb(pixels), paint(truth, palette), paint(prediction, palette))
    paths = [folder / f"{file_name(name)}.{part}.png" for part in PARTS]
    for path, picture in zip(paths, pictures, strict=True):
        _write_png(path, picture)
    return paths


def write_class_samples(folder: Path, name: str, image: Tensor, truth: int, prediction: int) -> list[Path]:
    """Write ``NAME.image.png`` and ``NAME.class.json`` (``{"truth": id, "predicted": id}``).

    Args:
        folder: Where to write.
        name: The sample's name; characters that do not belong in a file name are replaced.
        image: Raw image ``(C, H, W)``: uint8, or float whose range becomes black to white.
        truth: Global id of the image's class.
        prediction: Global id that was predicted.

    Raises:
        DataError: The image is not ``(C, H, W)``.
    """
    if image.ndim != 3:
        raise DataError(f"sample '{name}': an image {tuple(image.shape)} is not (channels, height, width)")
    picture, said = (folder / f"{file_name(name)}.{end}" for end in ("image.png", "class.json"))
    _write_png(picture, to_rgb(image.numpy()))
    write_json(said, {"truth": int(truth), "predicted": int(prediction)})
    return [picture, said]


def read_samples(folder: Path) -> dict[str, Sample]:
    """Complete samples of either sort in a folder by name, sorted; empty where the folder does not exist.

    Raises:
        DataError: A file with classes is damaged.
    """
    found: dict[str, Sample] = {}
    for path in sorted(folder.glob("*.image.png")):
        name = path.name.removesuffix(".image.png")
        files = [folder / f"{name}.{part}.png" for part in PARTS]
        said = folder / f"{name}.class.json"
        if said.is_file():
            found[name] = ClassSample(name, path, *_read_classes(said))
        elif all(f.is_file() for f in files):
            found[name] = SampleFiles(name, *files)
    return found


def _read_classes(path: Path) -> tuple[int, int]:
    """Ids of the true and of the predicted class."""
    value = read_json(path)
    ids = [value.get(key) for key in ("truth", "predicted")] if isinstance(value, dict) else []
    truth, predicted = ids or (None, None)
    if type(truth) is not int or type(predicted) is not int:
        raise DataError(f"{path} does not say the true and the predicted class", "the file was changed or is damaged")
    return truth, predicted


def paint(labels: npt.NDArray[Any], palette: Palette) -> Pixels:
    """Colour a label map: ``(H, W)`` -> ``(H, W, 3)`` uint8. A label outside the table is a DataError."""
    if labels.size and (labels.min() < 0 or labels.max() >= len(palette)):
        raise DataError(f"a label map holds {labels.min()} to {labels.max()}; labels run from 0 to {TABLE_SIZE - 1}")
    painted: Pixels = palette[labels.astype(np.int64)]
    return painted


def to_rgb(pixels: npt.NDArray[Any]) -> Pixels:
    """An image ``(C, H, W)`` as a picture ``(H, W, 3)`` uint8.

    Floating-point values that are not in 0..1 (Hounsfield units, MR) are stretched between their percentiles 0.5 and
    99.5. One channel becomes grey; of other counts than three, the first channel is shown.
    """
    if len(pixels) != 3:
        pixels = np.repeat(pixels[:1], 3, axis=0)
    if pixels.dtype != np.uint8:
        if pixels.min() < 0 or pixels.max() > 1:
            low, high = np.percentile(pixels, (0.5, 99.5))
            pixels = (pixels - low) / max(high - low, 1e-12)
        pixels = np.round(pixels.clip(0, 1) * 255).astype(np.uint8)
    rgb: Pixels = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    return rgb


def file_name(name: str) -> str:
    """Name without characters that trouble file systems; changed names get a short hash so that they stay apart."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _write_png(path: Path, pixels: Pixels) -> None:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format="PNG", optimize=True)

    def fill(part: Path) -> None:
        part.write_bytes(data.getvalue())

    write_atomic(path, fill)
