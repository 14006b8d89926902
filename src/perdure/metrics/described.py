"""A stream as its run folder describes it (``stream.json``): classes, tasks and groups, without any data.

Torch-free on purpose: figures and reports need names and ids only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from perdure.data.source import Kind
from perdure.errors import DataError
from perdure.files import read_json
from perdure.labels import BACKGROUND, Color, Palette, paint_table


@dataclass(frozen=True, slots=True)
class DescribedClass:
    """One class: global id, name, kind and colour (RGB, 0..255)."""

    id: int
    name: str
    kind: str
    color: Color


@dataclass(frozen=True, slots=True)
class DescribedTask:
    """One task: position, name and the ids it teaches, knows already and annotates."""

    index: int
    name: str
    new: tuple[int, ...]
    old: tuple[int, ...]
    annotated: tuple[int, ...]

    @property
    def seen(self) -> tuple[int, ...]:
        """All classes known after this task, in learning order."""
        return self.old + self.new


@dataclass(frozen=True, slots=True)
class DescribedStream:
    """What ``stream.json`` says.

    Args:
        protocol: Short description of how the stream was made.
        dataset: Name of the data set.
        background: Name of label 0, or ``None`` where every pixel has a class.
        patients: True where images come from patients.
        classes: All classes, in label order.
        tasks: The tasks in order.
        groups: Classes by the task that teaches them; several groups and one task mean joint training.
        kind: What a label describes: every pixel (segmentation) or the whole image (classification).
    """

    protocol: str
    dataset: str
    background: str | None
    patients: bool
    classes: tuple[DescribedClass, ...]
    tasks: tuple[DescribedTask, ...]
    groups: tuple[tuple[int, ...], ...]
    kind: Kind = "segmentation"

    @property
    def merged(self) -> bool:
        """True where one task teaches the classes of several groups (joint training)."""
        return len(self.tasks) == 1 and len(self.groups) > 1

    @property
    def names(self) -> dict[int, str]:
        """Names by id, label 0 included."""
        return {BACKGROUND: self.background or "unlabelled", **{c.id: c.name for c in self.classes}}

    @property
    def order(self) -> tuple[int, ...]:
        """All taught class ids in learning order."""
        return tuple(c for group in self.groups for c in group)

    def group_of(self, class_id: int) -> int:
        """Index of the group that teaches a class."""
        return next(j for j, group in enumerate(self.groups) if class_id in group)

    def palette(self) -> Palette:
        """RGB table ``(TABLE_SIZE, 3)`` uint8 for painting label maps."""
        return paint_table({c.id: c.color for c in self.classes})


def read_stream(path: Path) -> DescribedStream:
    """Read ``stream.json``. Raises DataError where it is missing, damaged or contradicts itself."""
    return parse_stream(read_json(path), str(path))


def parse_stream(value: Any, where: str = "stream.json") -> DescribedStream:
    """Turn the content of ``stream.json`` into a description. Raises DataError as :func:`read_stream` does."""
    try:
        stream = DescribedStream(
            protocol=str(value["protocol"]),
            dataset=str(value["dataset"]),
            background=value.get("background"),
            patients=bool(value.get("patients", False)),
            classes=tuple(_class(c) for c in value["classes"]),
            tasks=tuple(_task(t) for t in value["tasks"]),
            groups=tuple(_ids(g) for g in value["groups"]),
            kind=value.get("kind", "segmentation"),  # runs made before classification came do not say it
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{where} does not describe a stream: {error!r}", "the file was changed or is damaged"
        ) from error
    _check(stream, where)
    return stream


def _class(value: Mapping[str, Any]) -> DescribedClass:
    red, green, blue = (int(part) for part in value["color"])
    return DescribedClass(int(value["id"]), str(value["name"]), str(value["kind"]), (red, green, blue))


def _task(value: Mapping[str, Any]) -> DescribedTask:
    return DescribedTask(
        int(value["index"]), str(value["name"]), _ids(value["new"]), _ids(value["old"]), _ids(value["annotated"])
    )


def _ids(values: Any) -> tuple[int, ...]:
    return tuple(int(v) for v in values)


def _check(stream: DescribedStream, where: str) -> None:
    """Raise DataError unless ids, tasks and groups agree with each other."""
    hint = "the file was changed or is damaged"
    if stream.kind not in get_args(Kind):
        raise DataError(f"{where}: unknown kind of labels '{stream.kind}'", f"known: {', '.join(get_args(Kind))}")
    known = {c.id for c in stream.classes}
    if [t.index for t in stream.tasks] != list(range(len(stream.tasks))):
        raise DataError(f"{where}: tasks are not numbered 0, 1, 2, …", hint)
    unknown = [c for t in stream.tasks for c in t.seen if c not in known]
    if unknown:
        raise DataError(f"{where}: a task teaches class {unknown[0]}, which is not in the class list", hint)
    taught = sorted(c for t in stream.tasks for c in t.new)
    if taught != sorted(stream.order) or len(set(taught)) != len(taught):
        raise DataError(f"{where}: the groups do not hold each taught class exactly once", hint)
    by_task = [sorted(t.new) for t in stream.tasks]
    if len(stream.tasks) > 1 and by_task != [sorted(g) for g in stream.groups]:
        raise DataError(f"{where}: groups and tasks disagree on which task teaches which class", hint)
