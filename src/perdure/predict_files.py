"""Image files in, masks or a table of classes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from perdure.data.readers.imagefiles import IMAGE_SUFFIXES, read_image
from perdure.errors import DataError
from perdure.files import write_json
from perdure.outputs.images import refuse_unwritable, table_names, write_masks, write_predictions
from perdure.trained import Trained


def find_images(inputs: Iterable[Path]) -> list[Path]:
    """Image files among files and folders (searched without going deeper), sorted within each folder.

    Raises:
        DataError: A path does not exist, cannot be read, is no image or is given twice, or nothing was found.
    """
    places = list(inputs)
    found: list[Path] = []
    for path in places:
        if path.is_dir():
            try:
                inside = [p for p in path.iterdir() if not p.name.startswith(".") and p.is_file()]
            except OSError as error:
                raise DataError(
                    f"the folder {path} cannot be read: {error.strerror}", "check who may read it"
                ) from error
            found += sorted(p for p in inside if p.suffix.lower() in IMAGE_SUFFIXES)
        elif not path.exists():
            raise DataError(f"{path} does not exist", "give image files, or folders that hold some")
        elif path.suffix.lower() not in IMAGE_SUFFIXES:
            raise DataError(f"{path} is not an image that can be read", f"readable: {', '.join(IMAGE_SUFFIXES)}")
        else:
            found.append(path)
    if not found:
        where = f" in {places[0]}" if len(places) == 1 else f" in {len(places)} folders" if places else ""
        raise DataError(f"no images found{where}", f"looked for {', '.join(IMAGE_SUFFIXES)}, not in folders inside")
    known: set[Path] = set()
    for path in found:
        whole = path.parent.resolve() / path.name  # a link to a file keeps its own name: it may be there on purpose
        if whole in known:
            raise DataError(f"{path} is given twice", "name each image once, by itself or by its folder")
        known.add(whole)
    return found


def predict_images(model: Trained, inputs: Iterable[Path], out: Path, done: Callable[[int, int], None]) -> list[Path]:
    """Segment images: ``out/index/NAME.png`` (class ids), ``out/color/NAME.png`` (colours), ``out/classes.json``.

    Formats: see :func:`~perdure.outputs.images.write_masks`.

    Args:
        model: The model.
        inputs: Image files and folders.
        out: Folder for the masks.
        done: Called with the number of finished images and of all images.

    Returns:
        The masks, two per image.

    Raises:
        DataError: See :func:`find_images`; two images would have one mask; or a file is damaged, transparent or has
            more than 8 bits per channel: the masks of the images before it are there, of it and those after it
            nothing.
        PerdureError: The disk is full or ``out`` cannot be written.
    """
    paths = find_images(inputs)
    first: dict[str, Path] = {}
    for path in paths:
        if path.stem in first:
            raise DataError(
                f"{first[path.stem]} and {path} would both be written as {path.stem}.png",
                "rename one, or use two folders",
            )
        first[path.stem] = path
    written: list[Path] = []
    for number, path in enumerate(paths, 1):
        labels = model.predict(read_image(path)).labels
        if number == 1:
            write_json(out / "classes.json", model.classes())
        written += write_masks(out, path.stem, labels, model.space, max(model.seen))
        done(number, len(paths))
    return written


def classify_images(model: Trained, inputs: Iterable[Path], out: Path, done: Callable[[int, int], None]) -> Path:
    """Classify images: ``out/predictions.csv`` and ``out/classes.json``, both written when all images are done.

    The table: see :func:`~perdure.outputs.images.write_predictions`; its columns of probabilities are the classes
    learned so far in the order of their ids.

    Args:
        model: The model.
        inputs: Image files and folders.
        out: Folder for the table.
        done: Called with the number of finished images and of all images.

    Returns:
        The table.

    Raises:
        DataError: See :func:`find_images`; or a file is damaged, transparent or has more than 8 bits per channel:
            nothing is written then.
        PerdureError: The disk is full or ``out`` cannot be written.
    """
    paths = find_images(inputs)
    names = table_names(paths)
    refuse_unwritable(out)
    rows: list[tuple[str, dict[int, float]]] = []
    for number, (path, name) in enumerate(zip(paths, names, strict=True), 1):
        rows.append((name, model.predict(read_image(path)).scores))
        done(number, len(paths))
    write_json(out / "classes.json", model.classes())
    write_predictions(out / "predictions.csv", rows, model.space, sorted(model.seen))
    return out / "predictions.csv"
