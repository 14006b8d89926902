"""Class-incremental streams: the classes of one data set, taught a few at a time.

Image selection, label tables and split names follow the protocol that STAR shares with MiB: in training only the
classes of the step keep their labels; earlier and later classes become background.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Final, Literal, get_args

import numpy as np

from perdure.data.dataset import Dataset
from perdure.data.preparation import Preparation
from perdure.data.source import MEASURED, Measured, Source, Split
from perdure.errors import DataError, UsageError, nearest, plain
from perdure.labels import BACKGROUND, IGNORE, TABLE_SIZE, LabelSpace, remap_table
from perdure.streams import lists
from perdure.streams.description import called
from perdure.streams.task import Stream, TaskData, TaskSpec, make_stream

Setting = Literal["overlap", "disjoint", "partition", "partition-rarest"]
SETTINGS: Final[tuple[str, ...]] = get_args(Setting)
Order = str | Sequence[int | str]
Groups = tuple[tuple[int, ...], ...]
Pool = Literal["val", "test"] | Source
"""Unlabelled images that a protocol grants: a split of the stream's data set, or another source, all images of which
are granted from the first task on."""


def class_incremental(
    source: Source,
    *,
    base: int,
    step: int,
    preparation: Preparation,
    setting: Setting = "overlap",
    order: Order = "natural",
    order_seed: int = 0,
    partition_file: Path | None = None,
    short_last: bool = False,
    pool: Pool | None = None,
    measured: Measured = "test",
    sealed: int = 0,
) -> Stream:
    """Stream that teaches ``base`` classes first and ``step`` more per further task.

    Training and test lists are computed here (from the masks, cached, see :mod:`perdure.streams.lists`). The validation
    list is computed on first use, so that a data set without a validation split can be learned.

    Args:
        source: The data set.
        base: Classes of the first task.
        step: Classes per further task.
        preparation: Preparation of cases for training, validation and testing.
        setting: Which images a task contains: ``overlap``, ``disjoint``, ``partition`` (lists from
            ``partition_file``) or ``partition-rarest`` (computed; our own rule).
        order: ``natural``, ``shuffled`` (by ``order_seed``), or class ids or names in learning order. Classes
            outside a given order are never taught and remain background.
        order_seed: Seed of the shuffled order.
        partition_file: See :mod:`perdure.streams.lists`.
        short_last: Allow a last task with fewer classes, if ``step`` does not divide the rest.
        pool: Images that a method may use without labels: those of a split that show classes seen so far, or all
            images of a source. With the measured split the figures are transductive, and the protocol says so.
        measured: The split that figures are measured on: ``val`` where settings are chosen.
        sealed: So many tasks are sealed: they need no training images any more.

    Raises:
        UsageError: Base, step, order or setting are invalid.
        DataError: A task has no training or no test image, or the partition does not match the images.
    """
    groups = split_classes(learning_order(source.space, order, order_seed), base, step, short_last)
    if source.other_label not in (BACKGROUND, IGNORE):
        what = f"other_label of {source.name} is {source.other_label}"
        raise UsageError(what, f"0 counts later classes as background, {IGNORE} ignores them")
    names = task_names(source.space, groups)
    presence = lists.cached_presence(source, "train")
    train = _train_rows(source, presence, groups, setting, partition_file)
    test = lists.seen(lists.cached_presence(source, measured), groups)
    if sealed < len(groups):
        _refuse_masks_without_classes(source, presence)
    for split, first, rows in (("training", sealed, train), (MEASURED[measured], 0, test)):
        for group, name, found in list(zip(groups, names, rows, strict=True))[first:]:
            _refuse_task_without_images(source, setting, split, called(name, len(group)), group, presence, found)
    granted = None if pool is None else _granted(source, pool)
    plan = _Plan(source, groups, train, test, preparation, granted, measured)
    specs = [
        TaskSpec(name, new, frozenset(new), setting == "overlap", preparation, partial(plan.open, index))
        for index, (name, new) in enumerate(zip(names, groups, strict=True))
    ]
    told = setting if source.kind == "segmentation" else ""  # an image of one class is in one task for every setting
    protocol = _protocol(base, step, told, order, order_seed, partition_file, granted, measured)
    return make_stream(source.space, specs, protocol, measured=measured)


@dataclass(frozen=True)
class _Plan:
    """Image lists and label tables of all tasks.

    A class and not closures: spawned loader workers receive the data sets pickled, and with them what they refer to.
    """

    source: Source
    groups: Groups
    train: list[lists.Rows]
    test: list[lists.Rows]
    preparation: Preparation
    granted: tuple[Source, Split] | None
    measured: Measured

    @cached_property
    def validation(self) -> list[lists.Rows]:
        return lists.overlap(lists.cached_presence(self.source, "val"), self.groups)

    def open(self, index: int, check: Callable[[], None]) -> TaskData:
        new = self.groups[index]
        seen = [c for group in self.groups[: index + 1] for c in group]
        every = [c for group in self.groups for c in group]
        return TaskData(
            train=lambda: self.view("train", index, new, check),
            validation=lambda: self.view("val", index, new, check),
            tests=lambda: {MEASURED[self.measured]: self.measured_view(index, seen)},
            joint=lambda split: self.view(split, index, every, check),
            pool=None if self.granted is None else partial(self.pool, *self.granted, index, check),
        )

    def pool(self, source: Source, split: Split, index: int, check: Callable[[], None]) -> Dataset:
        """Granted images of a task: of a split those that show a class seen so far. All labels are ``IGNORE``."""
        names = tuple(source.names(split))
        if split != "train":
            rows = lists.seen(lists.cached_presence(source, split), self.groups)[index]
            names = tuple(names[row] for row in rows)
        hidden = np.full(TABLE_SIZE, IGNORE, np.int16)
        return Dataset(source, split, names, hidden, self.preparation, True, check)

    def measured_view(self, index: int, seen: Sequence[int]) -> Dataset:
        """Images of the measured split that show a class seen so far, with the labels ``seen``."""
        names, table = self.source.names(self.measured), remap_table(seen, self.source.other_label)
        return Dataset(
            self.source, self.measured, tuple(names[row] for row in self.test[index]), table, self.preparation
        )

    def view(self, split: Split, index: int, keep: Sequence[int], check: Callable[[], None]) -> Dataset:
        """Training or validation images of one task with the labels ``keep``; for others see ``other_label``."""
        rows, names = self.train if split == "train" else self.validation, self.source.names(split)
        table = remap_table(keep, BACKGROUND if split == "train" else self.source.other_label)
        chosen = tuple(names[row] for row in rows[index])
        return Dataset(self.source, split, chosen, table, self.preparation, split == "train", check)


def parse_split(text: str) -> tuple[int, int]:
    """Base and step of a split's published name: ``"15-1"`` -> (15, 1)."""
    match = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", text)
    if not match:
        raise UsageError(f"'{text}' is no split", "write BASE-STEP, e.g. 15-1")
    return int(match[1]), int(match[2])


def split_classes(ids: Sequence[int], base: int, step: int, short_last: bool = False) -> Groups:
    """Cut classes in learning order into tasks: ``base`` first, then ``step`` at a time.

    ``step`` must divide the rest, unless ``short_last`` allows a smaller last task. Raises UsageError otherwise.
    """
    if base < 1 or base > len(ids):
        raise UsageError(f"base is {base}, but there are {len(ids)} classes", f"choose between 1 and {len(ids)}")
    rest = len(ids) - base
    if rest and (step < 1 or (rest % step and not short_last)):
        fits = ", ".join(str(s) for s in range(1, rest + 1) if rest % s == 0)
        hint = f"try {fits}, or stream.short_last=true"
        raise UsageError(f"{rest} classes are left after base {base}: step {step} does not fit", hint)
    cuts = [0, *range(base, len(ids), step if rest else 1), len(ids)]
    return tuple(tuple(ids[a:b]) for a, b in pairwise(cuts))


def learning_order(space: LabelSpace, order: Order, seed: int = 0) -> tuple[int, ...]:
    """Class ids in learning order. See ``order`` of :func:`class_incremental`."""
    if isinstance(order, str):
        if order == "natural":
            return space.ids
        if order == "shuffled":
            shuffle = np.random.Generator(np.random.PCG64(seed)).permutation(len(space))
            return tuple(space.ids[i] for i in shuffle)
        words = ("natural", "shuffled")
        raise UsageError(f"unknown class order '{order}'", f"{nearest(order, words)} or a list of classes")
    if not order:
        raise UsageError("the class order is empty", "give natural, shuffled, or a list of classes")
    ids = [space.id_of(c) if isinstance(c, str) else c for c in order]
    unknown = [i for i in ids if i not in space.ids]
    if unknown:
        raise UsageError(
            f"the class order names class {unknown[0]}, which the data set lacks",
            f"ids run from {min(space.ids)} to {max(space.ids)}",
        )
    twice = [i for k, i in enumerate(ids) if i in ids[:k]]
    if twice:
        raise UsageError(f"class '{space.name(twice[0])}' occurs twice in the class order", "name it once")
    return tuple(ids)


def task_names(space: LabelSpace, groups: Groups) -> list[str]:
    """Names for folders and tables: the class of a one-class task, else its positions in the order, "01-15"."""
    width = len(str(sum(len(g) for g in groups)))
    names: list[str] = []
    done = 0
    for group in groups:
        last = done + len(group)
        places = f"{done + 1:0{width}d}-{last:0{width}d}"
        names.append(slug(space.name(group[0])) if len(group) == 1 else places)
        done = last
    return names


def slug(text: str) -> str:
    """Text that is safe as a folder name: all characters but letters and digits become ``_``.

    A text of more than 100 bytes is cut, and ends in a digest then, so that names stay apart. File systems allow 255.
    """
    safe = re.sub(r"\W+", "_", text).strip("_") or "unnamed"
    if len(safe.encode()) <= 100:
        return safe
    return f"{safe.encode()[:90].decode(errors='ignore')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _refuse_masks_without_classes(source: Source, presence: lists.Presence) -> None:
    """Raise DataError where no training mask shows any class: very often 255 was meant as a class."""
    if source.kind == "segmentation" and not presence[:, list(source.space.ids)].any():
        ignored = bool(presence[:, IGNORE].any())
        raise DataError(
            f"{source.name}: no training mask shows a class, only background{' and 255 (ignore)' if ignored else ''}",
            "if 255 is a class, say so under data: values: {255: 1}, or 'data.values={255: 1}' as an override"
            if ignored and source.name == "folders"
            else "masks hold the numbers of the class file",
        )


def _refuse_task_without_images(
    source: Source,
    setting: str,
    split: str,
    task: str,
    group: Sequence[int],
    presence: lists.Presence,
    rows: lists.Rows,
) -> None:
    """Raise DataError where a task has no image in a split, or no training image that shows one of its classes."""
    if not len(rows):
        classes = ", ".join(source.space.name(c) for c in group)
        raise DataError(
            f"{source.name}: no {split} image for task '{task}' ({classes}; setting {setting})",
            "leave these classes out of the order, teach more classes per task, or choose setting overlap",
        )
    if split != "training":
        return
    if absent := [c for c in group if not presence[rows, c].any()]:
        raise DataError(
            f"{source.name}: no training image of task '{task}' shows class "
            f"{', '.join(repr(source.space.name(c)) for c in absent)} (setting {setting})",
            "a class without a pixel cannot be learned: leave it out with stream.order, or add images",
        )


def _granted(source: Source, pool: Pool) -> tuple[Source, Split]:
    """Where unlabelled images come from; that they are missing is told before any work starts."""
    if isinstance(pool, str):
        lists.cached_presence(source, pool)
        return source, pool
    pool.names("train")
    return pool, "train"


def _train_rows(
    source: Source, presence: lists.Presence, groups: Groups, setting: str, file: Path | None
) -> list[lists.Rows]:
    if setting not in SETTINGS:
        raise UsageError(f"unknown setting '{setting}'", nearest(setting, SETTINGS))
    if (setting == "partition") != (file is not None):
        what = "needs" if setting == "partition" else "takes no"
        raise UsageError(
            f"setting {setting} {what} partition_file", "only setting partition reads its image lists from that file"
        )
    if setting == "partition" and file is not None:
        names = source.names("train")
        return lists.partition(presence, groups, lists.read_partition(file, names, len(groups)), names)
    rules = {
        "overlap": lists.overlap,
        "disjoint": lists.disjoint,
        "partition-rarest": lists.partition_by_rarest,
    }
    return rules[setting](presence, groups)


def _protocol(
    base: int,
    step: int,
    setting: str,
    order: Order,
    order_seed: int,
    partition_file: Path | None,
    granted: tuple[Source, Split] | None,
    measured: Measured,
) -> str:
    """What was asked for, in words: reports show it, and a run refuses to go on under another one."""
    text = f"class-incremental {base}-{step} {setting}".rstrip()
    if granted is not None:
        source, split = granted
        if split == "train":
            text += f", {len(source.names('train'))} unlabelled images of their own in training"
        else:
            transductive = " (transductive)" if split == measured else ""
            text += f", unlabelled {MEASURED[split]} images{transductive} in training"
    if partition_file is not None:
        text += f" from {plain(partition_file.name)}"
    if order == "shuffled":
        return f"{text}, order shuffled with seed {order_seed}"
    return text if order == "natural" else f"{text}, order given"
