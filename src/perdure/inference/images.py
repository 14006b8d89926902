"""Image files in, masks or classes out."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image

from perdure.data.imagefiles import IMAGE_SUFFIXES, read_image
from perdure.errors import DataError
from perdure.files import write_atomic, write_json, write_text
from perdure.inference.trained import Trained


def find_images(inputs: Iterable[Path]) -> list[Path]:
    """Image files among files and folders (searched without going deeper), sorted within each folder.

    Raises:
        DataError: A path does not exist, is no image, nothing was found, or two files would give one output.
    """
    found: list[Path] = []
    for path in inputs:
        if path.is_dir():
            inside = (p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
            found += sorted(p for p in inside if p.suffix.lower() in IMAGE_SUFFIXES)
        elif not path.exists():
            raise DataError(f"{path} does not exist", "give image files, or folders that hold some")
        elif path.suffix.lower() not in IMAGE_SUFFIXES:
            raise DataError(f"{path} is not an image that can be read", f"readable: {', '.join(IMAGE_SUFFIXES)}")
        else:
            found.append(path)
    if not found:
        raise DataError("no images found", f"looked for {', '.join(IMAGE_SUFFIXES)}")
    first: dict[str, Path] = {}
    for path in found:
        if path.stem in first:
            raise DataError(
                f"{first[path.stem]} and {path} would both be written as {path.stem}.png",
                "rename one, or use two folders",
            )
        first[path.stem] = path
    return found


def predict_images(model: Trained, inputs: Iterable[Path], out: Path, done: Callable[[int, int], None]) -> list[Path]:
    """Segment images: ``out/index/NAME.png`` (class ids), ``out/color/NAME.png`` (palette), ``out/classes.json``.

    Args:
        model: The model.
        inputs: Image files and folders.
        out: Folder for the masks.
        done: Called with the number of finished images and of all images.

    Returns:
        The masks, two an image.

    Raises:
        DataError: See :func:`find_images`; or a file is damaged, transparent or has more than 8 bits a channel:
            the masks of the images before it are there, of it and those after it nothing.
        PerdureError: The disk is full or ``out`` cannot be written.
    """
    paths = find_images(inputs)
    palette = model.space.palette().flatten().tolist()
    written: list[Path] = []
    for number, path in enumerate(paths, 1):
        labels = model.segment(read_image(path).transpose(1, 2, 0))
        if number == 1:
            write_json(out / "classes.json", model.classes())
        index = Image.fromarray(labels)
        color = index.copy()
        color.putpalette(palette)
        for folder, picture in (("index", index), ("color", color)):
            target = out / folder / f"{path.stem}.png"
            write_atomic(target, lambda part, p=picture: p.save(part, "PNG"))  # type: ignore[misc]
            written.append(target)
        done(number, len(paths))
    return written


def classify_images(model: Trained, inputs: Iterable[Path], out: Path, done: Callable[[int, int], None]) -> Path:
    """Classify images: ``out/predictions.csv`` (class and probabilities of each file) and ``out/classes.json``.

    Args:
        model: The model.
        inputs: Image files and folders.
        out: Folder for the table.
        done: Called with the number of finished images and of all images.

    Returns:
        The table.

    Raises:
        DataError: See :func:`find_images`; or a file is damaged, transparent or has more than 8 bits a channel:
            nothing is written then.
        PerdureError: The disk is full or ``out`` cannot be written.
    """
    paths = find_images(inputs)
    ids = sorted(model.seen)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "class_id", "class", "probability", *(f"p({model.space.name(c)})" for c in ids)])
    for number, path in enumerate(paths, 1):
        scores = model.classify(read_image(path).transpose(1, 2, 0))
        best = max(scores, key=scores.__getitem__)
        row = [path.name, best, model.space.name(best), scores[best], *(scores[c] for c in ids)]
        writer.writerow([f"{v:.6f}" if isinstance(v, float) else v for v in row])
        done(number, len(paths))
    write_json(out / "classes.json", model.classes())
    write_text(out / "predictions.csv", text.getvalue())
    return out / "predictions.csv"
