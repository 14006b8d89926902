"""A finished run on new image files: its newest sealed model, and masks or a table of classes.

The data that the model learned from is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from perdure.config.build import build_method
from perdure.config.load import refuse_foreign_code
from perdure.data.case import unlabelled
from perdure.data.preparation import Preparation
from perdure.data.readers.imagefiles import IMAGE_SUFFIXES, read_image, to_grey
from perdure.data.source import Kind
from perdure.errors import DataError, PerdureError, RunError, UsageError
from perdure.files import write_json
from perdure.inference.case import predict_cases
from perdure.labels import BACKGROUND, LabelSpace
from perdure.methods.method import Method
from perdure.methods.options import Options
from perdure.outputs.images import refuse_unwritable, table_names, write_masks, write_predictions
from perdure.run_folder import RunFolder
from perdure.sealing import restore_sealed
from perdure.streams.description import restore


class Answer(NamedTuple):
    """What a model predicts for one image.

    Args:
        labels: Global ids ``(*S)`` int16, or ``()`` where an image has one class.
        confidence: Score of the winning class, same shape, float32.
        scores: Score of each class by id where an image has one class; else empty.
    """

    labels: np.ndarray
    confidence: np.ndarray
    scores: dict[int, float]


@dataclass
class Trained:
    """A model with its classes.

    Args:
        method: In evaluation mode, on ``device``.
        preparation: How images are shown to it: that of the task it learned last.
        space: All classes of the stream.
        seen: Ids of the classes learned so far, in learning order.
        device: Where it computes.
        kind: Whether it labels pixels or images.
    """

    method: Method[Options]
    preparation: Preparation
    space: LabelSpace
    seen: tuple[int, ...]
    device: torch.device
    kind: Kind = "segmentation"

    @classmethod
    def open(cls, path: Path, device: str = "auto", allow_code: bool = False) -> Trained:
        """Load the newest sealed task of a run onto ``device``: auto (a GPU if there is one), cpu or cuda.

        A run may come from somebody else: what it names outside of Perdure is imported with ``allow_code`` only.

        Raises:
            UsageError: A GPU was asked for and there is none, or the run needs code that was not allowed.
            RunError: The folder is not a run, or none of its tasks is sealed yet.
            DataError: A file of the run is damaged.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device is cuda, but no GPU can be used here", "use --device auto or cpu")
        run = RunFolder.existing(path)
        described = run.stream()
        recipe, stream, sealed = run.recipe(), restore(described), run.sealed()
        if not sealed:
            raise RunError(
                f"no task of {path} is sealed yet: there is nothing to predict with",
                "go on with `perdure run … --resume`",
            )
        if not allow_code:
            refuse_foreign_code(recipe, str(run.recipe_file), data=False)
        where = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
        method = build_method(recipe, stream.tasks[0].preparation, pretrained=False)
        restore_sealed(method, stream.tasks, run, sealed, recipe.seed)
        method.to(where).eval()
        newest = stream.tasks[len(sealed) - 1]
        return cls(method, newest.preparation, stream.space, newest.seen, where, described.kind)

    def predict(self, image: np.ndarray) -> Answer:
        """Label a photograph as test images are labelled in the run.

        Args:
            image: ``(3, H, W)`` uint8; made grey for a model that learned grey images.
        """
        shown = to_grey(image) if self.preparation.channels == 1 else image
        ready = self.preparation.show(unlabelled(torch.from_numpy(np.array(shown)), self.kind == "classification"))
        assert ready.grid is not None
        images = ready.image[None].to(self.device)
        scores: dict[int, float] = {}
        if self.kind == "segmentation":
            labels, confidence = predict_cases(self.method.predict, images, self.preparation, ready.grid)
        else:  # a table of classes also needs the scores, and the image is one window
            with torch.no_grad():
                made = self.method.predict(images)
                scores = dict(zip(made.class_ids, made.scores()[0].tolist(), strict=True))
            labels, confidence = predict_cases(lambda _: made, images, self.preparation, ready.grid)
        return Answer(labels[0].cpu().numpy(), confidence[0].cpu().numpy(), scores)

    def classes(self) -> list[dict[str, object]]:
        """What :meth:`predict` may answer: ids with names and colours."""
        ids = (BACKGROUND, *sorted(self.seen)) if self.space.background else tuple(sorted(self.seen))
        return [{"id": c, "name": self.space.name(c), "color": list(self.space[c].color)} for c in ids]


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
            nothing, and the message says how many are there.
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
        try:
            labels = model.predict(read_image(path)).labels
            if number == 1:
                write_json(out / "classes.json", model.classes())
            written += write_masks(out, path.stem, labels, model.space, max(model.seen))
        except PerdureError as error:
            # whole masks are worth keeping, but whoever finds them has to know that they are not all
            so_far = f"{number - 1} of {len(paths)} images are written to {out}"
            raise type(error)(f"{error.what}; {so_far}", error.hint) from error
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
