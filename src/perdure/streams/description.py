"""A stream as its run folder describes it (``stream.json``): classes, tasks and groups, nothing of the data.

The one writer and the one reader of the file. Torch-free at import: figures and reports need names and ids only.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from perdure.data.source import MEASURED, Kind, Measured
from perdure.errors import DataError, RunError, UsageError, odd
from perdure.files import read_json, write_json
from perdure.labels import BACKGROUND, ClassInfo, LabelSpace

if TYPE_CHECKING:
    from perdure.streams.task import Stream, Task

_HINT = "the file was changed or is damaged: restore it"


def called(name: str, classes: int) -> str:
    """What people call a task of so many classes: "classes 1 to 15" where its name gives places in the class order.

    The names themselves, such as "01-15", are those of folders and of files for programs.
    """
    places = re.fullmatch(r"(\d+)-(\d+)", name)
    if places is None or classes < 2 or int(places[2]) - int(places[1]) + 1 != classes:
        return name
    return f"classes {int(places[1])} to {int(places[2])}"


class DescribedTask(BaseModel):
    """One task: position from 0, name, the ids it teaches, knows already and annotates, and what it learned from.

    Args:
        recurs: See :class:`perdure.streams.task.Task`.
        preparation: Plain data of a :class:`perdure.data.preparation.Preparation`.
        data: The part of the recipe that names the task's data, without places on a machine.
        images: Number of its training images.
        digest: Of its training list: names, order and label table.
        content: Fingerprint of its training images (:func:`perdure.data.content.content_fingerprint`).
        pool: Fingerprint of the unlabelled images that it may use; empty without any.
        tests: Fingerprint of its own test cases, where every task has its own.
    """

    model_config = ConfigDict(frozen=True)

    index: int
    name: str
    new: tuple[int, ...]
    old: tuple[int, ...]
    annotated: tuple[int, ...]
    recurs: bool
    preparation: dict[str, JsonValue]
    data: dict[str, JsonValue] = {}
    images: int = 0
    digest: str = ""
    content: str = ""  # runs of earlier versions say neither this
    pool: str = ""  # nor this
    tests: str = ""  # nor this

    @property
    def seen(self) -> tuple[int, ...]:
        """All classes known after this task, in learning order."""
        return self.old + self.new

    @property
    def called(self) -> str:
        """Its name where people read it: see :func:`called`."""
        return called(self.name, len(self.new))

    @property
    def spoken(self) -> str:
        """The same in a sentence: "task sheep", "classes 1 to 15"."""
        return self.called if self.called != self.name else f"task {self.name}"

    @property
    def source(self) -> str:
        """Its data set in a few words: "phantoms (kind torso, set organs)"; empty where several are merged."""
        told = ("classes", "rename", "annotated", "name", "root")
        options = [f"{key} {value}" for key, value in self.data.items() if key not in told and value is not None]
        name = str(self.data.get("name", ""))
        return f"{name} ({', '.join(options)})" if name and options else name

    def differs(self, other: DescribedTask, sealed: bool) -> str:
        """In words, what is not the same in another description of this task; of a sealed one apart from images."""
        images = {"images", "digest", "content", "pool", "tests"}
        old, new = (task.model_dump(exclude=images if sealed else None) for task in (self, other))
        known = self.content and other.content  # else one of the two was described without looking at images
        unknown = {"tests"} if known else {"content", "pool", "tests"}
        key = next((key for key, value in old.items() if value != new[key] and key not in unknown), "")
        if key == "data":
            names = sorted(self.data.keys() | other.data.keys())
            key = "data." + next(name for name in names if self.data.get(name) != other.data.get(name))
        number = f"{other.images} training images instead of {self.images}"
        said = {
            "": "",
            "digest": "other training images",
            "images": number,
            "content": "its training images have other content",
            "pool": "its unlabelled images have other content",
        }
        return said.get(key, f"it has another value of '{key}'")


def _by(sides: Iterable[object]) -> str:
    return " × ".join(f"{side:g}" if isinstance(side, float) else str(side) for side in sides)


class DescribedStream(BaseModel):
    """What ``stream.json`` says; the fields stand there in this order.

    Args:
        protocol: Short description of how the stream was made.
        dataset: Name of the data set.
        kind: What a label describes: every pixel (segmentation) or the whole image (classification).
        background: Name of label 0, or ``None`` where every pixel has a class.
        patients: True where images come from patients.
        measured: The split that figures are measured on.
        tolerance: Of surface Dice, in mm.
        classes: All classes, in label order.
        tasks: The tasks in order.
        groups: Classes by the task that teaches them; several groups and one task mean joint training.
    """

    model_config = ConfigDict(frozen=True)

    protocol: str
    dataset: str
    kind: Kind = "segmentation"  # runs made before classification came do not say it
    background: str | None
    patients: bool
    measured: Measured = "test"  # nor do runs made before the choice came say it
    tolerance: float = 2.0  # nor this
    classes: tuple[ClassInfo, ...]
    tasks: tuple[DescribedTask, ...]
    groups: tuple[tuple[int, ...], ...]

    @property
    def space(self) -> LabelSpace:
        """The classes as a label space."""
        return LabelSpace(self.classes, self.background)

    @property
    def names(self) -> dict[int, str]:
        """Names by id, label 0 included."""
        space = self.space
        return {label: space.name(label) for label in (BACKGROUND, *space.ids)}

    @property
    def merged(self) -> bool:
        """True where one task teaches the classes of several groups (joint training)."""
        return len(self.tasks) == 1 and len(self.groups) > 1

    @property
    def of_data_sets(self) -> bool:
        """True where every task has a data set of its own."""
        return self.protocol.startswith("data sets")

    @property
    def order(self) -> tuple[int, ...]:
        """All taught class ids in learning order."""
        return tuple(c for group in self.groups for c in group)

    def group_of(self, class_id: int) -> int:
        """Index of the group that teaches a class."""
        return next(j for j, group in enumerate(self.groups) if class_id in group)

    @property
    def measured_images(self) -> str:
        """The word for images that figures are measured on: ``test`` or ``validation``."""
        return MEASURED[self.measured]

    @property
    def evaluation(self) -> tuple[str, str]:
        """In words, what is measured of images (figures of two runs must share it), and how large ones are cut."""
        shown = self.tasks[-1].preparation
        size, window = shown.get("size"), shown.get("window")
        if shown.get("kind") in ("volume3d", "slices2d"):
            spacing = shown.get("spacing")
            at = f", at {_by(spacing)} mm" if isinstance(spacing, list | tuple) else ""
            whole = "whole volumes" if shown["kind"] == "volume3d" else "whole images or volumes"
            whole = f"{whole} at their own size and spacing"
            if any(task.preparation != shown for task in self.tasks):
                return whole, ", shown to the network by a plan of each task"
            network = f"windows of {_by(window)} voxels" if isinstance(window, list | tuple) else "slices"
            return whole, f", shown to the network in {network}{at}"
        cut = (
            ""
            if window is None or "overlap" not in shown
            else f", in windows of {window} pixels where larger (overlap {shown['overlap']:.0%})"
        )
        if shown.get("kind") == "class_image":
            return "whole images, padded or scaled to the network's square", ""
        if shown.get("protocol") == "centre_crop":
            return f"the centre {size} × {size} of images whose shorter side is scaled to {size} pixels", cut
        scaled = f", shorter side scaled to {size} pixels for the network" if size else ""
        return f"whole images at their own size{scaled}", cut

    def continued_by(self, other: DescribedStream, sealed: int) -> DescribedStream:
        """This stream with the further tasks of ``other``, which has to begin with it: a stream only grows at its end.

        Args:
            other: The stream that a recipe makes now.
            sealed: How many tasks are sealed. Their training images are not needed any more: they may be deleted or
                joined by others, and what stands here of them stays.

        Raises:
            RunError: The streams differ in what has been learned or is being learned.
        """
        whole = {"protocol", "kind", "background", "tolerance"}
        here, there = self.model_dump(include=whole), other.model_dump(include=whole)
        for key, value in here.items():
            if value != there[key]:
                raise RunError(
                    f"the run has {key} '{value}', the recipe makes '{there[key]}'",
                    "use the same recipe, or another folder with --out",
                )
        if self.patients and not other.patients:
            raise RunError("the run has images of patients, the recipe says that there are none", "use the same recipe")
        # the colours of a run stay: those of a data set without a palette may have changed since
        known = len(self.classes)
        if [(c.id, c.name, c.kind) for c in other.classes[:known]] != [(c.id, c.name, c.kind) for c in self.classes]:
            raise RunError(
                "the classes of the data set are not those that the run began with",
                "give the folder that it was learned from; if it is that one, bring its class list back as it was",
            )
        for mine in self.tasks:
            theirs = other.tasks[mine.index] if mine.index < len(other.tasks) else None
            what = "the recipe has no such task" if theirs is None else mine.differs(theirs, mine.index < sealed)
            if not what and (self.merged or other.merged) and other.groups != self.groups:
                what = "it teaches the classes of other tasks"
            if what:
                raise RunError(
                    f"task {mine.index + 1} ('{mine.called}') of the run is not the same any more: {what}",
                    "bring data and recipe back as they were; new tasks can only be added at the end",
                )
        kept = self.tasks[:sealed] + other.tasks[sealed:]
        return other.model_copy(update={"tasks": kept, "classes": self.classes + other.classes[known:]})


def describe(
    stream: Stream,
    dataset: str,
    patients: bool,
    kind: Kind = "segmentation",
    data: Sequence[Mapping[str, JsonValue]] = (),
    sealed: int = 0,
    tolerance: float = 2.0,
) -> DescribedStream:
    """All that prediction and figures need to know of a stream.

    Args:
        stream: The stream.
        dataset: Name of the data set.
        patients: Whether images come from patients.
        kind: What a label describes: every pixel, or the image.
        data: For each task the part of the recipe that names its data, without places on a machine.
        sealed: So many tasks have been learned; their images may be gone and are not looked at.
        tolerance: Of surface Dice, in mm.

    Raises:
        DataError: An image is damaged.
    """
    from perdure.data.content import content_fingerprint
    from perdure.data.dataset import members  # these load torch

    tasks: list[DescribedTask] = []
    for task in stream.tasks:
        images, digest, seen, pool, tests = 0, "", "", "", ""
        if task.data is not None and task.index >= sealed:
            samples, content = task.data.train(), hashlib.blake2b(digest_size=12)
            for part in members(samples):
                content.update("\0".join(part.names).encode(errors="surrogateescape") + part.table.tobytes())
            images, digest = len(samples), content.hexdigest()
            seen = content_fingerprint(members(samples))
            pool = content_fingerprint([task.data.pool()]) if task.data.pool is not None else ""
            tests = tests_fingerprint(task)
        tasks.append(
            DescribedTask(
                index=task.index,
                name=task.name,
                new=task.new,
                old=task.old,
                annotated=tuple(sorted(task.annotated)),
                recurs=task.recurs,
                preparation=task.preparation.model_dump(mode="json"),
                data=dict(data[task.index]) if data else {},
                images=images,
                digest=digest,
                content=seen,
                pool=pool,
                tests=tests,
            )
        )
    return DescribedStream(
        protocol=stream.protocol,
        dataset=dataset,
        kind=kind,
        background=stream.space.background,
        patients=patients,
        measured=stream.measured,
        tolerance=tolerance,
        classes=stream.space.classes,
        tasks=tuple(tasks),
        groups=stream.groups,
    )


def told_of_repeats(stream: DescribedStream, sealed: int) -> list[str]:
    """Which data sets that are still to be learned have the training images of an earlier one, a sentence each.

    Images and labels are compared by :func:`perdure.data.content.content_fingerprint`, not by names and places.
    """
    later = stream.tasks[sealed:] if stream.of_data_sets else ()
    pairs = [(task, one) for task in later for one in stream.tasks[: task.index] if task.content == one.content != ""]
    return [
        f"'{task.name}' has the training images and labels of '{one.name}', which comes before it: the same data set "
        "again teaches nothing new"
        for task, one in pairs
    ]


def tests_fingerprint(task: Task) -> str:
    """Fingerprint of the test cases of a task that has its own, empty where tasks share them or they are gone."""
    from perdure.data.content import content_fingerprint

    own = task.data.tests().get(task.name) if task.data is not None else None
    return "" if own is None else content_fingerprint([own])


def restore(described: DescribedStream) -> Stream:
    """The stream of a description, without data: its tasks know their classes but cannot be opened.

    Raises:
        DataError: The preparation of a task is damaged.
    """
    from perdure.data.preparation import read_preparation  # these load torch
    from perdure.streams.task import TaskSpec, make_stream

    specs = [
        TaskSpec(t.name, t.new, frozenset(t.annotated), t.recurs, read_preparation(t.preparation, "stream.json"))
        for t in described.tasks
    ]
    return make_stream(described.space, specs, described.protocol, described.groups, described.measured)


def write_stream(path: Path, described: DescribedStream) -> None:
    """Write ``stream.json`` atomically; equal descriptions give equal bytes."""
    write_json(path, described.model_dump(mode="json"))


def read_stream(path: Path) -> DescribedStream:
    """Read ``stream.json``. Raises DataError where it is missing, damaged or contradicts itself."""
    return parse_stream(read_json(path), str(path))


def parse_stream(value: object, where: str = "stream.json") -> DescribedStream:
    """Turn the content of ``stream.json`` into a description that fits together.

    Args:
        value: The content: plain values as :func:`write_stream` writes them.
        where: The file, for messages.

    Raises:
        DataError: A part is missing or of a wrong type, or classes, tasks and groups contradict each other.
    """
    try:
        stream = DescribedStream.model_validate(value)
        known = set(stream.space.ids)
    except ValidationError as error:
        first = error.errors()[0]
        what = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
        raise DataError(f"{where} does not describe a stream: {what}", _HINT) from error
    except UsageError as error:  # two classes of one name, an id out of range
        raise DataError(f"{where} does not describe a stream: {error.what}", _HINT) from error
    wrong = None
    old: tuple[int, ...] = ()
    for index, task in enumerate(stream.tasks):
        unknown = [c for c in (*task.new, *task.annotated) if c not in known]
        if unknown:
            wrong = f"task '{task.name}' has class {unknown[0]}, which is not in the class list"
        elif task.index != index:
            wrong = "tasks are not numbered 0, 1, 2, …"
        elif task.old != old:
            wrong = f"the classes before task '{task.name}' are not those that earlier tasks teach"
        old = task.seen
    groups = [sorted(group) for group in stream.groups]
    texts = (stream.protocol, stream.dataset, *(task.name for task in stream.tasks))
    if not wrong and any(odd(letter) for text in texts for letter in text):
        wrong = "a name holds control characters"
    if not wrong and not stream.tasks:
        wrong = "it has no task"
    if not wrong and (sorted(old) != sorted(stream.order) or len(set(old)) != len(old)):
        wrong = "the groups do not hold each taught class exactly once"
    if not wrong and len(stream.tasks) > 1 and [sorted(t.new) for t in stream.tasks] != groups:
        wrong = "groups and tasks disagree on which task teaches which class"
    if wrong:
        raise DataError(f"{where} does not describe a stream: {wrong}", _HINT)
    return stream
