"""Image files in, masks out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from perdure.errors import DataError
from perdure.files import write_atomic, write_json
from perdure.inference.trained import Trained

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def find_images(inputs: Iterable[Path]) -> list[Path]:
    """Image files among files and folders (searched without going deeper), sorted within each folder.

    Raises:
        DataError: A path does not exist, is no image, nothing was found, or two files would give one output.
    """
    found: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found += sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        elif not path.exists():
            raise DataError(f"{path} does not exist")
        elif path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{path} is not an image that can be read", f"readable: {', '.join(SUFFIXES)}")
        else:
            found.append(path)
    if not found:
        raise DataError("no images found", f"looked for {', '.join(SUFFIXES)}")
    first: dict[str, Path] = {}
    for path in found:
        if path.stem in first:
            raise DataError(f"{first[path.stem]} and {path} would both be written as {path.stem}.png", "rename one, or use two folders")
        first[path.stem] = path
    return found


def read_image(path: Path) -> np.ndarray:
    """RGB pixels ``(H, W, 3)`` uint8. Raises DataError for a file that is no image or is cut off."""
    try:
        with Image.open(path) as opened:
            return np.asarray(opened.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}", "the file may be damaged or cut off") from error


def predict_images(model: Trained, inputs: Iterable[Path], out: Path, done: Callable[[int, int], None]) -> list[Path]:
    """Segment images: ``out/index/NAME.png`` (class ids), ``out/color/NAME.png`` (palette), ``out/classes.json``.

    Args:
        model: The model.
        inputs: Image files and folders.
        out: Folder for the masks.
        done: Called with the number of finished images and of all images.
    """
    paths = find_images(inputs)
    write_json(out / "classes.json", model.classes())
    palette = model.space.palette().flatten().tolist()
    written: list[Path] = []
    for number, path in enumerate(paths, 1):
        labels = model.segment(read_image(path))
        index = Image.fromarray(labels, "L")
        color = Image.fromarray(labels, "P")
        color.putpalette(palette)
        for folder, picture in (("index", index), ("color", color)):
            target = out / folder / f"{path.stem}.png"
            write_atomic(target, lambda part, p=picture: p.save(part, "PNG"))  # type: ignore[misc]
            written.append(target)
        done(number, len(paths))
    return written
