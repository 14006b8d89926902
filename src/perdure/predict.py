"""A finished run on new files: its newest sealed model, and label maps of images or volumes, or a table of classes.

The data that the model learned from is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from perdure.config.build import build_method
from perdure.config.load import refuse_foreign_code
from perdure.data.case import Case, Geometry, unlabelled
from perdure.data.preparation import Preparation, read_preparation
from perdure.data.readers.imagefiles import IMAGE_SUFFIXES, read_image, to_grey
from perdure.data.readers.inputs import Input, find_images, read_input
from perdure.data.readers.inputs import find_cases as find_cases_in
from perdure.data.source import Kind, size_text
from perdure.data.volumes.extra import free_memory
from perdure.data.volumes.files import ENDINGS
from perdure.data.volumes.preprocessing import Volume3D
from perdure.data.volumes.sampled import Sampled
from perdure.data.volumes.slices import Slices2D
from perdure.errors import DataError, PerdureError, RunError, UsageError, nearest
from perdure.files import write_json
from perdure.inference.case import predict_cases
from perdure.labels import BACKGROUND, ClassInfo, LabelSpace, spread_colors
from perdure.methods.method import Method
from perdure.methods.options import Options
from perdure.outputs.images import refuse_unwritable, table_names, write_masks, write_predictions
from perdure.outputs.volumes import write_label_volume
from perdure.run_folder import RunFolder
from perdure.sealing import restore_sealed
from perdure.streams.description import DescribedTask, restore


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
        preparation: How images are shown to it: that of the task it learned last, or of the one that was asked for.
        space: All classes of the stream.
        seen: Ids of the classes learned so far, in learning order.
        device: Where it computes.
        kind: Whether it labels pixels or images.
        note: Said where images could have been shown in another way too; else empty.
    """

    method: Method[Options]
    preparation: Preparation
    space: LabelSpace
    seen: tuple[int, ...]
    device: torch.device
    kind: Kind = "segmentation"
    note: str = ""

    @classmethod
    def open(
        cls, path: Path, device: str = "auto", allow_code: bool = False, task: str = "", names: Sequence[str] = ()
    ) -> Trained:
        """Load the newest sealed task of a run onto ``device``: auto (a GPU if there is one), cpu or cuda.

        A run may come from somebody else: what it names outside of Perdure is imported with ``allow_code`` only.
        Images are shown as those of ``task`` were, by name or number from 1; by default as those of the newest task.
        Classes that were not learned are predicted too where the method reads ``names``.

        Raises:
            UsageError: A GPU was asked for and there is none, the run needs code that was not allowed, it has no
                such task, its method reads no names, or a class was learned already.
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
        seen, learned = stream.tasks[len(sealed) - 1].seen, described.tasks[: len(sealed)]
        space = stream.space
        if names:
            space, further = with_names(space, seen, names)
            method.add_names({c: space.name(c) for c in further})
            seen += further
        method.to(where).eval()
        chosen = task_named(learned, task)
        several = any(other.preparation != chosen.preparation for other in learned)
        note = (
            f"each task has a preparation of its own; images are shown as those of '{chosen.called}', the newest task "
            "(another one: --task NAME)"
        )
        preparation = stream.tasks[chosen.index].preparation
        return cls(method, preparation, space, seen, where, described.kind, note if several and not task else "")

    def predict(self, image: np.ndarray, geometry: Geometry | None = None, name: str = "the image") -> Answer:
        """Label an image or a volume as test cases are labelled in the run.

        Args:
            image: Photograph ``(3, H, W)`` uint8, made grey for a model that learned grey images; or a volume
                ``(C, D, H, W)`` float32.
            geometry: Where the voxels lie.
            name: For messages.

        Raises:
            DataError: The image does not fit the model, or is too large for the memory.
        """
        grey = image.ndim == 3 and len(image) == 3 and self.preparation.channels == 1
        shown = np.require(to_grey(image) if grey else image, requirements=["C", "W"])
        case = unlabelled(torch.from_numpy(shown), self.kind == "classification", geometry, name)
        if image.ndim == 4 and isinstance(self.preparation, Sampled):
            _refuse_too_large(case, self.preparation)
        ready = self.preparation.show(case)
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


def with_names(space: LabelSpace, seen: Sequence[int], names: Sequence[str]) -> tuple[LabelSpace, tuple[int, ...]]:
    """A label space with classes by name, and their ids: their own where the stream knows them, else new ones.

    Raises:
        UsageError: A class was learned already.
    """
    known = {info.name: info.id for info in space.classes}
    for name in names:
        if known.get(name) in seen:
            raise UsageError(f"--classes: '{name}' is learned already", "name only classes that are not")
    new = list(dict.fromkeys(name for name in names if name not in known))
    first = max(space.ids) + 1
    colors = spread_colors(first + len(new))
    added = [ClassInfo(first + k, name, color=colors[first + k - 1]) for k, name in enumerate(new)]
    extended = LabelSpace((*space.classes, *added), space.background)
    return extended, tuple(dict.fromkeys(extended.id_of(name) for name in names))


def find_cases(preparation: Preparation, inputs: Iterable[Path]) -> list[Input]:
    """What a model can predict of files and folders: volumes, images, or both for a model of slices.

    Raises:
        DataError: See :func:`perdure.data.readers.inputs.find_cases`.
    """
    if isinstance(preparation, Sampled):
        endings = ENDINGS if preparation.dims == 3 else (*IMAGE_SUFFIXES, *ENDINGS)
        return find_cases_in(inputs, endings, preparation.accepted_channels)
    return [Input(path.stem, (path,)) for path in find_images(inputs)]


def task_named(learned: Sequence[DescribedTask], name: str) -> DescribedTask:
    """A sealed task by its name or its number from 1; the newest where no name is given.

    Raises:
        UsageError: There is none.
    """
    if not name:
        return learned[-1]
    found = next((task for task in learned if name in (task.name, task.called)), None)
    if found is None and name.isdecimal() and 1 <= int(name) <= len(learned):
        found = learned[int(name) - 1]
    if found is None:
        known = nearest(name, [task.called for task in learned])
        raise UsageError(f"--task {name}: the run has learned no such task", f"{known}, or a number from 1 on")
    return found


def cases_of_run(run: Path, inputs: Iterable[Path], task: str = "") -> list[Input]:
    """The same of a run, from its description alone: without its weights. ``task``: see :meth:`Trained.open`.

    Raises:
        UsageError: The run has learned no such task.
        RunError: The folder is not a run.
        DataError: See :func:`find_cases`; or a file of the run is damaged.
    """
    folder = RunFolder.existing(run)
    tasks = folder.stream().tasks
    chosen = task_named(tasks[: max(1, len(folder.sealed()))], task)
    return find_cases(read_preparation(chosen.preparation, "stream.json"), inputs)


def predict_files(model: Trained, inputs: Iterable[Path], out: Path, done: Callable[[int, int], None]) -> list[Path]:
    """Segment images and volumes, and write ``out/classes.json``.

    Of an image ``out/index/NAME.png`` (class ids) and ``out/color/NAME.png`` (colours), see
    :func:`~perdure.outputs.images.write_masks`; of a volume ``out/NAME.nii.gz`` on its own grid, see
    :func:`~perdure.outputs.volumes.write_label_volume`.

    Args:
        model: The model.
        inputs: Files and folders.
        out: Folder for the label maps.
        done: Called with the number of finished cases and of all.

    Returns:
        The label maps, two per image and one per volume.

    Raises:
        DataError: See :func:`find_cases`; two cases would have one label map, or one would replace an input; or a file
            is damaged, or no such image as the model learned from: the label maps of the cases before it are there, of
            it and those after it nothing, and the message says how many are there.
        PerdureError: The disk is full or ``out`` cannot be written.
    """
    cases = find_cases(model.preparation, inputs)
    refuse_run_folder(out)
    _refuse_clashes(cases, out)
    kind = "volumes" if all(case.ending for case in cases) else "images"
    written: list[Path] = []
    for number, case in enumerate(cases, 1):
        try:
            labels, geometry = _segmented(model, case)
            if number == 1:
                write_json(out / "classes.json", model.classes())
            if case.ending:
                written.append(write_label_volume(out, case.name, labels, geometry, case.ending))
            else:
                written += write_masks(out, case.name, labels, model.space, max(model.seen))
        except PerdureError as error:
            # whole label maps are worth keeping, but whoever finds them has to know that they are not all
            so_far = f"{number - 1} of {len(cases)} {kind} are written to {out}"
            raise type(error)(f"{error.what}; {so_far}", error.hint) from error
        done(number, len(cases))
    return written


def _segmented(model: Trained, case: Input) -> tuple[np.ndarray, Geometry]:
    if not isinstance(model.preparation, Sampled):
        return model.predict(read_image(case.files[0])).labels, Geometry()
    image, geometry = read_input(case, model.preparation.accepted_channels)
    try:
        return model.predict(image, geometry, case.name).labels, geometry
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise DataError(
            f"{case.files[0]} ({size_text(image.shape[1:])} voxels) does not fit into memory with the model",
            "crop it, use a machine with more memory, or --device cpu",
        ) from error


def _refuse_clashes(cases: Sequence[Input], out: Path) -> None:
    """Raise DataError where two cases would have one label map, or a label map would replace an input."""
    first: dict[str, Path] = {}
    for case in cases:
        path = case.files[0]
        if case.target in first:
            raise DataError(
                f"{first[case.target]} and {path} would both be written as {case.target}",
                "rename one, or use two folders",
            )
        first[case.target] = path
        target = out / case.target
        if case.ending and target.exists() and any(target.samefile(file) for file in case.files):
            raise DataError(f"the label map of {path} would replace it", "give another folder: -o DIR")
    scans = next(
        (case.files[0] for case in cases if case.ending and case.files[0].parent.resolve() == out.resolve()), None
    )
    if scans is not None:
        raise DataError(
            f"label maps in {out} would lie among the scans, such as {scans.name}", "give another folder: -o DIR"
        )


def refuse_run_folder(out: Path) -> None:
    """Raise UsageError where ``out`` lies in a run folder: names of patients' files do not belong there."""
    # a recipe alone makes no run folder: people keep theirs where they work
    places = (out, *out.absolute().parents)
    run = next((p for p in places if RunFolder(p).recipe_file.is_file() and (p / "stream.json").is_file()), None)
    if run is not None:
        raise UsageError(
            f"{out} lies in the run folder {run}, which holds nothing but the run", "give another folder: -o DIR"
        )


def _refuse_too_large(case: Case, preparation: Preparation) -> None:
    """Raise DataError where a volume that could be read does not fit into memory as it is shown to the network."""
    channels, *size = case.image.shape
    raw, spacing = math.prod(size), case.geometry.spacing or (1.0, 1.0, 1.0)
    if isinstance(preparation, Volume3D):
        sides = zip(size, spacing, preparation.raw_spacing, strict=True)
        shown = math.prod(max(1, round(n * s / to)) for n, s, to in sides)
    else:
        assert isinstance(preparation, Slices2D)
        shown = size[preparation.axis] * preparation.size**2
    # while it is resampled: the raw copy, a channel in double precision, and the result; later scores of one class on
    # both grids and the labels with their confidence
    needed = 4 * channels * (raw + shown) + 8 * shown + 16 * (raw + shown)
    free = free_memory()
    if needed > free:
        raise DataError(
            f"'{case.name}' ({size_text(size)} voxels) needs {needed / 2**30:.1f} GB of memory at the spacing of the "
            f"model, and {free / 2**30:.1f} GB are free",
            "crop it, or use a machine with more memory",
        )


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
        DataError: See :func:`~perdure.data.readers.inputs.find_images`; or a file is damaged, transparent or has more
            than 8 bits per channel: nothing is written then.
        PerdureError: The disk is full or ``out`` cannot be written.
    """
    paths = find_images(inputs)
    names = table_names(paths)
    refuse_run_folder(out)
    refuse_unwritable(out)
    rows: list[tuple[str, dict[int, float]]] = []
    for number, (path, name) in enumerate(zip(paths, names, strict=True), 1):
        rows.append((name, model.predict(read_image(path)).scores))
        done(number, len(paths))
    write_json(out / "classes.json", model.classes())
    write_predictions(out / "predictions.csv", rows, model.space, sorted(model.seen))
    return out / "predictions.csv"
