"""Data sets that arrive one after another: opened, put in order, and made into a stream."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from perdure.config.preparations import preparations
from perdure.config.recipe import DataSection, DataSetsSection, Recipe, StreamSection, TaskSection
from perdure.data.catalog import HELD_OUT, needs_folder, open_source
from perdure.data.gone import GoneSource
from perdure.data.source import Source
from perdure.errors import PerdureError, UsageError
from perdure.labels import ClassInfo, LabelSpace
from perdure.seeds import derive_seed
from perdure.streams.class_incremental import slug
from perdure.streams.description import DescribedStream
from perdure.streams.partial_labels import DataSet, partial_labels
from perdure.streams.task import Stream


def in_order(recipe: Recipe) -> Recipe:
    """The recipe with its data sets in the order in which they are learned, so that further ones come at the end."""
    plan = recipe.stream
    if isinstance(plan, StreamSection) or plan.order == "natural":
        return recipe
    tasks = list(plan.tasks)
    match plan.order:
        case "reversed":
            tasks.reverse()
        case "shuffled":
            generator = torch.Generator().manual_seed(derive_seed(recipe.seed, "order of data sets"))
            tasks = [tasks[k] for k in torch.randperm(len(tasks), generator=generator).tolist()]
        case names:
            by_name = {label(task): task for task in tasks}
            if sorted(names) != sorted(by_name):
                raise UsageError(
                    f"stream.order={list(names)} does not name each task once", f"tasks: {', '.join(by_name)}"
                )
            tasks = [by_name[name] for name in names]
    ordered = plan.model_copy(update={"tasks": tuple(tasks), "order": "natural"})
    return recipe.model_copy(update={"stream": ordered})


def label(task: TaskSection) -> str:
    """Name of the task of a data set."""
    return slug(task.name or task.data.name)


def open_sources(recipe: Recipe, sealed: int = 0, known: DescribedStream | None = None) -> tuple[Source, ...]:
    """The data sets of a recipe; those of sealed tasks that are not at hand without their images."""
    plan = recipe.stream
    if isinstance(plan, StreamSection):
        return (_opened(recipe.sets[0], recipe.sets[0].root),)
    if not plan.tasks:
        raise UsageError("the recipe names no data set", "give its folder: perdure run RECIPE --data DIR")
    sources: list[Source] = []
    for index, task in enumerate(plan.tasks):
        root = task.data.root if plan.root is None or task.data.root is None else plan.root / task.data.root
        absent = needs_folder(task.data.name) if root is None else not root.exists()
        if known is not None and index < sealed and absent:
            sources.append(_gone(known, index))
            continue
        try:
            sources.append(_opened(task.data, root))
        except PerdureError as error:
            raise type(error)(f"task {index + 1} ('{label(task)}'): {error.what}", error.hint) from error
    return tuple(sources)


def _opened(section: DataSection, root: Path | None) -> Source:
    held_out = {} if section.validation is None else {HELD_OUT: section.validation}
    return open_source(section.name, root, {**section.settings, **held_out})


def _gone(known: DescribedStream, index: int) -> Source:
    """What is known of a data set that was learned: the classes that it annotates, the new ones in learning order."""
    task, space = known.tasks[index], known.space
    ids = (*(c for c in task.annotated if c not in task.new), *task.new)
    classes = tuple(ClassInfo(k, space.name(c), space[c].kind, space[c].color) for k, c in enumerate(ids, 1))
    return GoneSource(task.name, known.kind, LabelSpace(classes, known.background), known.patients)


def data_sets(
    recipe: Recipe,
    plan: DataSetsSection,
    sources: Sequence[Source],
    known: DescribedStream | None,
    sealed: int = 0,
) -> tuple[Stream, list[str]]:
    """A task for every data set, shown to the network as the recipe says; and what fits badly."""
    shown, notes = preparations(recipe, sources, known)
    if gone := [task for task, source in zip(plan.tasks, sources, strict=True) if isinstance(source, GoneSource)]:
        notes.append(
            f"test cases of {', '.join(map(label, gone))} are not at hand: what is forgotten of them is not measured; "
            "keep test cases, and give --earlier TASK=DIR with every `perdure add`"
        )
    sets: list[DataSet] = []
    for task, source, preparation in zip(plan.tasks, sources, shown, strict=True):
        if isinstance(source, GoneSource):  # its classes have the names of the model already
            sets.append(DataSet(source, label(task), absent=task.annotated, preparation=preparation))
        else:
            sets.append(DataSet(source, label(task), task.classes, task.rename, task.annotated, preparation))
    measured = recipe.evaluate.split
    stream = partial_labels(
        sets, preparation=shown[0], union=plan.union, elsewhere=plan.elsewhere, measured=measured, learned=sealed
    )
    return stream, notes
