"""Streams of several data sets: every task is a data set that annotates only some of the classes (partial labels).

The same builder makes task-incremental streams (each data set adds classes) and domain-incremental streams (the same
classes from another device; such a task teaches no new class and annotates old ones).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from perdure.data.dataset import Dataset
from perdure.data.gone import GoneSource
from perdure.data.preparation import Preparation
from perdure.data.source import Measured, Source, Split
from perdure.errors import DataError, UsageError, nearest
from perdure.labels import BACKGROUND, ClassInfo, Color, LabelSpace, remap_table, spread_colors, wrong_name
from perdure.streams.class_incremental import slug
from perdure.streams.lists import cached_presence
from perdure.streams.task import Stream, TaskData, TaskSpec, make_stream

if TYPE_CHECKING:
    from perdure.data.volumes.working import WorkingFiles

Union = Literal["names", "offset"]
Elsewhere = Literal["absent", "unlabelled"]


@dataclass(frozen=True)
class DataSet:
    """A data set as a task.

    Args:
        source: Source of its samples.
        name: Name of the task; by default the source's name.
        classes: Names of the source's classes that it annotates, in learning order; by default all.
        rename: Source class name -> class name in the stream, for names that differ.
        absent: Further classes of the stream, by name, that its images cannot show: its background is none of them.
        preparation: How its cases are shown, where this is not as in the rest of the stream.
    """

    source: Source
    name: str = ""
    classes: Sequence[str] | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    absent: Sequence[str] = ()
    preparation: Preparation | None = None

    def pairs(self) -> list[tuple[int, str]]:
        """Local id and stream name of each annotated class. Raises UsageError for unknown or repeated names."""
        space = self.source.space
        chosen = space.ids if self.classes is None else tuple(space.id_of(name) for name in self.classes)
        known = [space.name(i) for i in chosen]
        strange = [name for name in self.rename if name not in known]
        if strange:
            raise UsageError(
                f"{self.label}: rename names class '{strange[0]}', which it does not annotate",
                nearest(strange[0], known),
            )
        pairs = [(i, self.rename.get(name, name)) for i, name in zip(chosen, known, strict=True)]
        twice = [name for name, count in Counter(name for _, name in pairs).items() if count > 1]
        if problem := next(filter(None, (wrong_name(name) for _, name in pairs)), ""):
            raise UsageError(f"{self.label}: {problem}", "give the class another name with rename")
        if (background := self.source.space.background) is not None and background in {name for _, name in pairs}:
            raise UsageError(
                f"{self.label}: a class is called '{background}', as what has no label is",
                "give it another name with rename",
            )
        if not pairs or twice:
            what = f"class '{twice[0]}' occurs twice" if twice else "no class is annotated"
            raise UsageError(f"{self.label}: {what}", "correct classes or rename")
        return pairs

    @property
    def label(self) -> str:
        """The task's name, safe as a folder name."""
        return slug(self.name or self.source.name)


def partial_labels(
    sets: Sequence[DataSet],
    *,
    preparation: Preparation,
    union: Union = "names",
    elsewhere: Elsewhere = "unlabelled",
    measured: Measured = "test",
    learned: int = 0,
) -> Stream:
    """Stream with one task per data set. ``tests()`` of a task has one test set per data set seen so far, by name.

    Data sets that are gone (:class:`~perdure.data.gone.GoneSource`) are tasks that cannot be opened, without tests.

    Args:
        sets: The data sets in learning order.
        preparation: Preparation of cases for training, validation and testing.
        union: ``names``: classes with the same name (after ``rename``) are one class. ``offset``: every data set
            has its own classes, named ``DATA SET: CLASS``; their ids follow those of the data sets before it.
        elsewhere: Whether images of one data set may show classes of the others (``unlabelled``) or cannot
            (``absent``). If ``unlabelled``, losses and figures leave out the pixels that might show such a class, see
            :class:`~perdure.data.case.Case`. In classification it has no effect: an image shows only its class.
        measured: The split that tests are taken from.
        learned: Number of data sets that were learned before: of them only test samples are needed.

    Raises:
        UsageError: Two tasks have one name, a class is unknown, there is no data set, or their kinds differ.
        DataError: A data set has no training or no test sample.
    """
    if not sets:
        raise UsageError("the stream has no data set", "give at least one")
    if union not in ("names", "offset"):
        raise UsageError(f"unknown union '{union}'", nearest(union, ("names", "offset")))
    if elsewhere not in ("absent", "unlabelled"):
        raise UsageError(f"unknown value of elsewhere: '{elsewhere}'", nearest(elsewhere, ("absent", "unlabelled")))
    twice = [name for name, count in Counter(s.label for s in sets).items() if count > 1]
    if twice:
        raise UsageError(f"two data sets are named '{twice[0]}'", "give each its own name: name=…")
    kinds = {part.source.kind for part in sets}
    if len(kinds) > 1:
        raise UsageError("some data sets label pixels and others whole images", "use data sets of one kind")
    space, maps = global_space(sets, union)
    owners = Counter(id(s.source) for s in sets)
    unlabelled = elsewhere == "unlabelled" and kinds == {"segmentation"}
    told: list[frozenset[int] | None] = [
        frozenset(own.values()).union(map(space.id_of, part.absent)) if unlabelled else None
        for part, own in zip(sets, maps, strict=True)
    ]
    ready: list[dict[Split, WorkingFiles]] = [{} for _ in sets]
    specs: list[TaskSpec] = []
    taught: set[int] = set()
    for index, part in enumerate(sets):
        labelled = tuple(maps[index].values())
        new = tuple(c for c in labelled if c not in taught)
        taught.update(new)
        data = _opener(sets, maps, told, index, preparation, measured, ready[index], index < learned)
        shown = part.preparation or preparation
        specs.append(TaskSpec(part.label, new, frozenset(labelled), owners[id(part.source)] > 1, shown, data))
    # the number of data sets is no part of it: a stream grows at its end and stays the same one
    return make_stream(space, specs, f"data sets one after another, union by {union}", measured=measured)


def global_space(sets: Sequence[DataSet], union: Union = "names") -> tuple[LabelSpace, list[dict[int, int]]]:
    """Label space of the stream, and per data set the map local id -> global id, in learning order."""
    pairs = [part.pairs() for part in sets]
    classes: list[ClassInfo] = []
    id_of: dict[str, int] = {}
    maps: list[dict[int, int]] = []
    colors: set[Color] = set()
    for part, own in zip(sets, pairs, strict=True):
        local: dict[int, int] = {}
        for local_id, name in own:
            # all of them and not only names that occur twice: a class keeps its name whatever comes later
            if union == "offset" and not isinstance(part.source, GoneSource):  # there names stand as they are
                name = f"{part.label}: {name}"
            if name not in id_of:
                id_of[name] = len(classes) + 1
                info = part.source.space[local_id]
                # two data sets may colour different classes alike, such as each its first one
                color = info.color
                if color in colors:
                    color = next(c for c in spread_colors(len(colors) + 2) if c not in colors)
                classes.append(ClassInfo(id_of[name], name, info.kind, color))
                colors.add(color)
            local[local_id] = id_of[name]
        maps.append(local)
    backgrounds = {part.source.space.background for part in sets}
    background = backgrounds.pop() if len(backgrounds) == 1 else "background"
    return LabelSpace(tuple(classes), background), maps


def _opener(
    sets: Sequence[DataSet],
    maps: Sequence[Mapping[int, int]],
    told: Sequence[frozenset[int] | None],
    index: int,
    preparation: Preparation,
    measured: Measured,
    ready: dict[Split, WorkingFiles],
    learned: bool,
) -> Callable[[Callable[[], None]], TaskData]:
    """``told``: the classes that each data set can tell from background; ``None`` where it can tell all."""

    def view(task: int, split: Split, guard: Callable[[], None] | None, training: bool = False) -> Dataset:
        source = sets[task].source
        names = tuple(source.names(split))
        if source.kind == "classification" and len(maps[task]) < len(source.space):
            # images of other classes have no label in this task; a segmented image still has its background
            present = cached_presence(source, split)[:, list(maps[task])]
            names = tuple(names[row] for row in np.flatnonzero(present.any(1)))
        if split != "val" and not names:
            raise DataError(f"{sets[task].label}: the {split} split is empty", "a task needs at least one sample")
        table = remap_table((), BACKGROUND if split == "train" else source.other_label)
        table[list(maps[task])] = list(maps[task].values())
        shown = sets[task].preparation or preparation
        working = ready.get(split) if task == index else None
        return Dataset(source, split, names, table, shown, training, guard, told[task], working)

    def prepare(folder: Path, advance: Callable[[], None]) -> None:
        """Write the working files of the training set."""
        from perdure.data.volumes.sampled import Sampled
        from perdure.data.volumes.working import prepare_working_files

        whole = view(index, "train", None)
        if isinstance(whole.preparation, Sampled):
            place, names = folder / sets[index].label, whole.names
            ready["train"] = prepare_working_files(
                whole.source, "train", names, whole.preparation, place, lambda *_: advance()
            )

    here = not isinstance(sets[index].source, GoneSource)
    needed: tuple[Split, ...] = (measured,) if learned else ("train", measured)
    for split in needed if here else ():
        view(index, split, None)  # raises for a missing split before any work starts
    present = [task for task in range(index + 1) if not isinstance(sets[task].source, GoneSource)]
    return lambda check: TaskData(
        train=lambda: view(index, "train", check, True),
        validation=lambda: view(index, "val", check),
        tests=lambda: {sets[task].label: view(task, measured, None) for task in present},
        joint=lambda split: view(index, split, check, split == "train"),
        prepare=prepare if here else None,
    )
