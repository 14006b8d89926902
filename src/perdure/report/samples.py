"""A few measured samples after each task: image, ground truth, prediction and errors, or an image and two classes.

Written when a task is sealed; read back as rows of a page, one sample in each, one column per task or per run.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from perdure.errors import DataError
from perdure.files import read_json, write_json
from perdure.labels import BACKGROUND, IGNORE, TABLE_SIZE, Color, Palette
from perdure.outputs.images import open_picture, write_png
from perdure.report.render import Thumb, embed, hex_color
from perdure.report.slices import shown_slices
from perdure.streams.description import DescribedStream

if TYPE_CHECKING:
    from torch import Tensor

    from perdure.data.case import Geometry

MOST_SAMPLES: Final = 6
"""Rows of a page."""
MOST_BYTES: Final = 12_000_000
"""Of the pictures of all rows; a page with more opens slowly, so it shows fewer samples."""
ERRORS: Final[tuple[tuple[str, Color], ...]] = (
    ("wrong class", (213, 94, 0)),
    ("missed", (240, 200, 0)),
    ("false alarm", (43, 125, 233)),
    ("not counted", (255, 255, 255)),
)
"""What an error map tells apart, in colours that colour-blind readers can part; what is right stays clear.

What is not counted is hatched in this colour and :data:`HATCH`: one grey could be background of the image below.
"""
HATCH: Final[Color] = (64, 64, 64)
NOT_COUNTED_BEFORE: Final[Color] = (140, 140, 140)  # runs made by earlier versions hold maps with this grey
_OF_SET: Final = re.compile(r"(.+)-\d{5}(-|$)")
"""Names of samples where several test sets are measured."""
Pixels = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.number]
Labels = npt.NDArray[np.integer]


class Maps(NamedTuple):
    """Pictures of the label maps of one sample; ``errors`` is ``None`` in runs made before there was such a map."""

    truth: Path
    prediction: Path
    errors: Path | None = None


class Classes(BaseModel):
    """Class ids of one sample whose image has one class; the content of ``NAME.class.json``."""

    model_config = ConfigDict(frozen=True, strict=True)

    truth: int
    predicted: int


@dataclass(frozen=True)
class Sample:
    """The picture of one sample, with either its label maps or its classes."""

    name: str
    image: Path
    maps: Maps | None = None
    classes: Classes | None = None


@dataclass(frozen=True)
class Said:
    """What a model called an image: the class's name, and ``right``, ``wrong`` or ``before`` (not taught yet)."""

    name: str
    state: str


@dataclass(frozen=True)
class Overlay:
    """What a model made of an image: ``data:`` addresses of its label map and of its errors."""

    prediction: str
    errors: str | None


@dataclass(frozen=True)
class SampleRow:
    """A sample on a page: ``data:`` addresses of label maps, or names of classes; ``None`` where a model has none."""

    name: str
    maps: bool
    image: Thumb
    truth: str
    predictions: list[Overlay | Said | None]


@dataclass(frozen=True)
class SampleTable:
    """Rows of samples, and names and CSS colours of what their label maps (classes) and error maps show."""

    rows: list[SampleRow]
    legend: list[tuple[str, str]]
    errors: list[tuple[str, str]]


def write_samples(
    folder: Path,
    name: str,
    image: Tensor,
    truth: Labels,
    prediction: Labels,
    palette: Palette,
    annotated: Collection[int] | None = None,
    geometry: Geometry | None = None,
) -> list[Path]:
    """Write ``NAME.image.png``, ``NAME.truth.png``, ``NAME.pred.png`` and ``NAME.error.png``.

    Of a volume two slices, ``NAME-mid`` and ``NAME-worst-s017``, see :func:`~perdure.report.slices.shown_slices`. The
    maps are clear (alpha 0) where they show background or what is right, so that they can lie on the image. A class
    that the case does not annotate is no false alarm on its background, as in figures: the error map shows it as not
    counted.

    Args:
        folder: Where to write.
        name: The sample's name; characters that do not belong in a file name are replaced.
        image: Raw image ``(C, *S)``: uint8, or float whose range becomes black to white.
        truth: Labels ``(*S)`` in global ids, ``IGNORE`` included.
        prediction: Labels ``(*S)`` in global ids.
        palette: RGB of each label, ``(TABLE_SIZE, 3)`` uint8.
        annotated: Classes that the truth can tell; ``None`` for all.
        geometry: Of a volume.

    Raises:
        DataError: The shapes of image, truth and prediction do not fit each other.
    """
    shape = tuple(image.shape[1:])
    if truth.shape != shape or prediction.shape != shape or len(shape) not in (2, 3):
        raise DataError(
            f"sample '{name}': image {tuple(image.shape)}, ground truth {truth.shape} and "
            f"prediction {prediction.shape} do not fit each other"
        )
    pixels, judged = image.numpy(), truth
    if annotated is not None:
        untold = (truth == BACKGROUND) & ~np.isin(prediction, [BACKGROUND, *annotated])
        judged = np.where(untold, IGNORE, truth)
    if len(shape) == 2:
        return _write_maps(folder, name, pixels, truth, judged, prediction, palette)
    paths: list[Path] = []
    for part, cut in shown_slices(pixels, truth, judged, prediction, geometry).items():
        paths += _write_maps(folder, f"{name}-{part}", *cut, palette)
    return paths


def _write_maps(
    folder: Path, name: str, pixels: Numbers, truth: Labels, judged: Labels, prediction: Labels, palette: Palette
) -> list[Path]:
    pictures = (to_rgb(pixels), paint(truth, palette), paint(prediction, palette), error_map(judged, prediction))
    paths = [folder / f"{file_name(name)}.{part}.png" for part in ("image", "truth", "pred", "error")]
    for path, picture in zip(paths, pictures, strict=True):
        write_png(path, Image.fromarray(picture), optimize=True)
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
    shown, classes = (folder / f"{file_name(name)}.{end}" for end in ("image.png", "class.json"))
    write_png(shown, Image.fromarray(to_rgb(image.numpy())), optimize=True)
    write_json(classes, Classes(truth=truth, predicted=prediction).model_dump())
    return [shown, classes]


def read_samples(folder: Path) -> dict[str, Sample]:
    """Complete samples of either sort in a folder by name, sorted; empty where the folder does not exist.

    Raises:
        DataError: A file with classes is damaged.
    """
    found: dict[str, Sample] = {}
    for path in sorted(folder.glob("*.image.png")):
        name = path.name.removesuffix(".image.png")
        errors, classes = folder / f"{name}.error.png", folder / f"{name}.class.json"
        maps = Maps(folder / f"{name}.truth.png", folder / f"{name}.pred.png", errors if errors.exists() else None)
        if any(file.is_symlink() for file in (path, classes, errors, maps.truth, maps.prediction)):
            continue  # a page must not show a file of somebody else's choice
        if classes.is_file():
            try:
                found[name] = Sample(name, path, classes=Classes.model_validate(read_json(classes)))
            except ValidationError as error:
                what = f"{classes} does not say the true and the predicted class"
                raise DataError(what, "the file was changed or is damaged") from error
        elif maps.truth.is_file() and maps.prediction.is_file():  # a run may be stopped between the three files
            found[name] = Sample(name, path, maps)
    return found


def paint(labels: Labels, palette: Palette) -> Pixels:
    """Colour a label map: ``(H, W)`` -> RGBA ``(H, W, 4)`` uint8, label 0 clear. Other numbers are a DataError."""
    if labels.size and (labels.min() < 0 or labels.max() >= len(palette)):
        raise DataError(f"a label map holds {labels.min()} to {labels.max()}; labels run from 0 to {TABLE_SIZE - 1}")
    alpha = np.where(labels == BACKGROUND, 0, 255).astype(np.uint8)
    return np.concatenate([palette[labels.astype(np.int64)], alpha[..., None]], axis=-1)


def error_map(truth: Labels, prediction: Labels) -> Pixels:
    """Where a prediction is wrong and how, in the colours of :data:`ERRORS`: RGBA ``(H, W, 4)`` uint8."""
    kinds = (
        (prediction != truth) & (prediction != BACKGROUND) & (truth != BACKGROUND),
        (prediction == BACKGROUND) & (truth != BACKGROUND),
        (prediction != BACKGROUND) & (truth == BACKGROUND),
        truth == IGNORE,  # last, for it is none of the others
    )
    painted = np.zeros((*truth.shape, 4), np.uint8)
    for (_, color), here in zip(ERRORS, kinds, strict=True):
        painted[here] = (*color, 255)
    # stripes as wide that a page which shows a photograph small still shows stripes
    y, x = np.indices(truth.shape)
    striped = (y + x) // max(2, max(truth.shape) // 48) % 2 == 1
    painted[(truth == IGNORE) & striped] = (*HATCH, 255)
    return painted


def to_rgb(pixels: Numbers) -> Pixels:
    """An image ``(C, H, W)`` as a picture ``(H, W, 3)`` uint8.

    Floating-point values that are not in 0..1 (Hounsfield units, MR) are stretched between their percentiles 0.5 and
    99.5. One channel becomes grey; of other counts than three, the first channel is shown.
    """
    if len(pixels) != 3:
        pixels = np.repeat(pixels[:1], 3, axis=0)
    if pixels.dtype != np.uint8:
        if pixels.min() < 0 or pixels.max() > 1:
            low, high = np.percentile(pixels, (0.5, 99.5))  # a little metal or noise must not take the whole range
            pixels = (pixels - low) / max(high - low, 1e-12)
        pixels = np.round(pixels.clip(0, 1) * 255).astype(np.uint8)
    rgb: Pixels = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    return rgb


def file_name(name: str) -> str:
    """Name without characters that trouble file systems, not too long; changed names get a hash and stay apart."""
    # two names that differ only in replaced characters need files of their own
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:100]  # an ending follows, and file systems allow 255 bytes
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def chosen_samples(names: Sequence[str], most: int = MOST_SAMPLES) -> list[str]:
    """The samples that a page shows, in order: as many of each test set where several are measured.

    Of a test set the first ones; of a volume that is the slice in the middle, then the worst one.
    """
    sets: dict[str, list[str]] = {}
    for name in names:
        found = _OF_SET.match(name)
        sets.setdefault(found[1] if found else "", []).append(name)
    turns = [name for turn in zip_longest(*sets.values()) for name in turn if name is not None]
    return [name for name in names if name in turns[:most]]


def sample_table(
    names: Sequence[str], columns: Sequence[tuple[DescribedStream, int, Mapping[str, Sample]]]
) -> SampleTable:
    """Lay samples out: one row per name, one column per model.

    Args:
        names: Which samples; the first few are shown.
        columns: Of each model its stream, after which task it was asked, and its samples by name. The last column
            has every name.
    """
    rows: list[SampleRow] = []
    maps: set[Path] = set()
    errors: set[Path] = set()
    left = MOST_BYTES
    for name in names[:MOST_SAMPLES]:
        sample = columns[-1][2][name]
        found = [(stream, after, samples.get(name)) for stream, after, samples in columns]
        known = [s.maps if s is not None else None for _, _, s in found]
        shown = [path for pair in known if pair for path in pair if path is not None]
        left -= sum(path.stat().st_size for path in (sample.image, *shown))
        if left < 0 and rows:
            break
        said: list[Overlay | Said | None]
        if sample.maps is not None:
            maps |= {path for pair in known if pair for path in pair[:2]}  # the legend names what any of them shows
            errors |= {pair.errors for pair in known if pair and pair.errors is not None}
            said = [_overlay(pair) if pair else None for pair in known]
            rows.append(SampleRow(name, True, embed(sample.image), embed(sample.maps.truth).address, said))
        elif sample.classes is not None:
            said = [_said(stream, after, s.classes) if s and s.classes else None for stream, after, s in found]
            wanted = sample.classes.truth
            called = columns[-1][0].names.get(wanted, str(wanted))
            rows.append(SampleRow(name, False, embed(sample.image), called, said))
    return SampleTable(rows, _legend(columns[-1][0], maps) if rows else [], _error_legend(errors))


def _overlay(maps: Maps) -> Overlay:
    return Overlay(embed(maps.prediction).address, None if maps.errors is None else embed(maps.errors).address)


def _said(stream: DescribedStream, after: int, classes: Classes) -> Said:
    name = stream.names.get(classes.predicted, str(classes.predicted))
    if classes.truth == classes.predicted:
        return Said(name, "right")
    return Said(name, "wrong" if classes.truth in stream.tasks[after].seen else "before")


def _legend(stream: DescribedStream, maps: set[Path]) -> list[tuple[str, str]]:
    """Name and colour of the classes that are seen in some pictures of label maps."""
    seen: set[Color] = set()
    for path in maps:
        pixels = np.unique(np.asarray(open_picture(path).convert("RGB")).reshape(-1, 3), axis=0)
        seen |= {(int(r), int(g), int(b)) for r, g, b in pixels}
    entries = [(c.name, hex_color(c.color)) for c in stream.classes if c.color in seen]
    end = [("not labelled", "#e0e0e0")] if (224, 224, 224) in seen else []  # the colour of ignore in palettes
    return entries + end  # label 0 is clear in all of them


def _error_legend(maps: set[Path]) -> list[tuple[str, str]]:
    """Name and CSS colour of the kinds of errors; "not counted" only where some map shows it."""
    if not maps:
        return []
    seen: set[Color] = set()
    for path in maps:
        pixels = np.asarray(open_picture(path).convert("RGBA")).reshape(-1, 4)
        found = np.unique(pixels[pixels[:, 3] > 0, :3], axis=0)
        seen |= {(int(r), int(g), int(b)) for r, g, b in found}
    *kinds, (name, color) = ((name, color) for name, color in ERRORS)
    entries = [(kind, hex_color(shown)) for kind, shown in kinds]
    if color in seen or HATCH in seen:
        stripes = f"{hex_color(color)} 0 3px,{hex_color(HATCH)} 3px 6px"
        entries.append((name, f"repeating-linear-gradient(135deg,{stripes})"))
    elif NOT_COUNTED_BEFORE in seen:
        entries.append((name, hex_color(NOT_COUNTED_BEFORE)))
    return entries
