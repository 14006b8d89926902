"""One more data set for a finished run: what it adds to the recipe, and what would go wrong."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import JsonValue

from perdure.config.build import method_class
from perdure.config.data_sets import label
from perdure.config.load import (
    dump_recipe,
    override,
    parse_recipe,
    read_raw,
    refuse_foreign_code,
    same_experiment,
    split_override,
)
from perdure.config.recipe import DataSetsSection, Recipe, TaskSection
from perdure.data.catalog import open_source
from perdure.data.detect import reader_of, short_name
from perdure.errors import RunError, UsageError, nearest
from perdure.kept.store import STORE, drop_items
from perdure.run_folder import BEGIN, RunFolder
from perdure.streams.class_incremental import slug
from perdure.streams.description import DescribedStream, write_stream
from perdure.streams.partial_labels import DataSet
from perdure.working import WorkingFolder


@dataclass(frozen=True)
class Addition:
    """A data set that is to be learned next.

    Args:
        data: Its folder, or the name of built-in data.
        name: Of the task; by default that of the folder.
        classes: Names of classes of the data set that it annotates; empty for all.
        rename: Name in the data set -> name in the model.
        same: Names in the model of classes that it has too; ``all`` for every class that both have.
        earlier: Name of an earlier task -> folder of its data, for its test cases.
        overrides: ``key=value``: options of the data set as ``data.KEY``, or what the recipe may change.
    """

    data: str
    name: str = ""
    classes: Sequence[str] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    same: Sequence[str] = ()
    earlier: Mapping[str, Path] = field(default_factory=dict)
    overrides: Sequence[str] = ()


def extended(run: RunFolder, addition: Addition, allow_code: bool = False) -> Recipe:
    """The recipe of a run with one more data set; the same again where that was begun and stopped.

    A run may come from somebody else: what it names outside of Perdure is imported with ``allow_code`` only.

    Raises:
        UsageError: A class is taken, an option is wrong, or code is needed that was not allowed.
        RunError: The run cannot be extended.
        DataError: The data set cannot be read.
    """
    stream, recipe = run.stream(), run.recipe()
    plan = recipe.stream
    if not isinstance(plan, DataSetsSection):
        raise RunError(
            f"{run.path} learned the classes of one data set in steps; only runs of data sets can be extended",
            "see `perdure list recipes`: those whose name begins with data-sets",
        )
    task = _task(addition)
    if not allow_code:  # here, because to ask a method or a reader anything imports it
        refuse_foreign_code(recipe, str(run.recipe_file))
        asked = plan.model_copy(update={"tasks": [task]})
        refuse_foreign_code(recipe.model_copy(update={"stream": asked}), f"--data {addition.data}")
    if method_class(recipe.method.name).sees_all_tasks:
        raise RunError(
            f"'{recipe.method.name}' learns all data sets at once and cannot learn one more",
            "run the whole recipe again, with all data",
        )
    learned = len(run.sealed())
    if learned == len(plan.tasks) and _bare(plan.tasks[-1]) == _bare(task):
        learned -= 1  # the very same was added before, and perhaps stopped after the seal: what is left is finished
    # after a kill the recipe may name the new task already and the description of the stream not yet
    begun_tasks = plan.tasks[learned:]
    if begun_tasks and (len(begun_tasks) > 1 or _bare(begun_tasks[0]) != _bare(task)):
        raise RunError(
            f"task {learned + 1} ('{label(begun_tasks[0])}') of {run.path} is not finished",
            "give the command that began it again, or `perdure add RUN --give-up` to take it out",
        )
    tasks = list(plan.tasks[:learned])
    _refuse_taken_names(task, stream, learned, plan, addition.same)
    tasks.append(task)
    # no run writes where its working files lay: a folder that names a place would send the next patients' images there
    content = recipe.model_dump(mode="json", exclude_none=True, exclude={"engine": {"working"}})
    content["stream"]["tasks"] = [one.model_dump(mode="json") for one in tasks]
    _put_earlier(content["stream"]["tasks"][:-1], [label(one) for one in tasks[:-1]], addition.earlier)
    rest = [text for text in addition.overrides if not text.startswith("data.")]
    made = parse_recipe(override(content, rest), str(run.recipe_file))
    if key := same_experiment(recipe, made):
        raise UsageError(
            f"'{key}' cannot be changed in a run: one more data set is learned as the others were",
            "leave it out; options of the data set are written data.KEY=VALUE",
        )
    return made


def begun(name: str, data: Sequence[str], overrides: Sequence[str]) -> Recipe:
    """A recipe of data sets, with those that are given by their folders in the place of its own.

    Args:
        name: A shipped recipe or a file.
        data: Folders of data sets, or names of built-in data, in the order in which they are learned.
        overrides: ``key=value``; options of the data sets as ``data.KEY``.

    Raises:
        UsageError: The recipe is for one data set, or an option is wrong.
        DataError: A folder holds no data set.
    """
    rest = [text for text in overrides if not text.startswith("data.")]
    content = override(read_raw(name), rest)
    plan = content.get("stream")
    if not isinstance(plan, dict) or plan.get("kind") != "data_sets":
        raise UsageError(
            f"'{name}' learns the classes of one data set in steps and takes no --data",
            "give its folder: data.root=DIR",
        )
    own = [text for text in overrides if text.startswith("data.")]
    tasks: list[JsonValue] = [_task(Addition(one, overrides=own)).model_dump(mode="json") for one in data]
    plan["tasks"] = tasks
    return parse_recipe(content, name)


def _task(addition: Addition) -> TaskSection:
    """The section of the new task, as a recipe would have it."""
    options = {
        key.removeprefix("data."): value
        for key, value in map(split_override, addition.overrides)
        if key.startswith("data.")
    }
    name, root = reader_of(addition.data, options)
    data: dict[str, JsonValue] = {"name": name, "root": None if root is None else str(root.absolute()), **options}
    if addition.name and addition.name != slug(addition.name):
        raise UsageError(
            f"--name {addition.name}: a task is named by letters, digits and _",
            f"its folder has the name too: --name {slug(addition.name)}",
        )
    own = addition.name or (short_name(root) if root is not None else str(name))
    content = {
        "data": data,
        "name": own,
        "classes": list(addition.classes) or None,
        "rename": dict(addition.rename),
    }
    return TaskSection.model_validate(content)


def _bare(task: TaskSection) -> JsonValue:
    """A task without the place of its data."""
    plain = task.model_dump(mode="json")
    plain["data"]["root"] = None
    bare: JsonValue = plain
    return bare


def _refuse_taken_names(
    task: TaskSection, stream: DescribedStream, sealed: int, plan: DataSetsSection, same: Sequence[str]
) -> None:
    """Raise UsageError where a class or a task has the name of an earlier one, and nobody said that it is the same."""
    earlier = stream.tasks[:sealed]
    if label(task) in (one.name for one in earlier):
        raise UsageError(f"the run has a task '{label(task)}' already", "give the new one another name: --name NAME")
    taken = {stream.space.name(c): one.name for one in earlier for c in one.new}
    if unknown := [name for name in same if name != "all" and name not in taken]:
        hint = nearest(unknown[0], taken) if taken else "no data set was learned before this one: leave it out"
        raise UsageError(f"--same {unknown[0]}: the model knows no such class", hint)
    if plan.union == "offset":
        return
    source = open_source(task.data.name, task.data.root, task.data.settings)
    names = [name for _, name in DataSet(source, label(task), task.classes, task.rename).pairs()]
    again = next(iter(stream.tasks[sealed:]), None)  # what has its name and its options; places of data do not count
    if again is not None and set(names) != {stream.space.name(c) for c in again.annotated}:
        raise UsageError(
            f"the run has a task '{label(task)}' already, and this data set has other classes",
            "give the new one another name: --name NAME",
        )
    if "all" not in same and (clash := [name for name in names if name in taken and name not in same]):
        shown, own = ", ".join(clash), {new: old for old, new in task.rename.items()}
        old = own.get(clash[0], clash[0])  # --rename takes the name that the data set has
        same_one = f"--rename {old}={clash[0]} --same {clash[0]}" if clash[0] in own else f"--same {clash[0]}"
        raise UsageError(
            f"the model has learned {shown} from '{taken[clash[0]]}' already",
            f"{same_one} if it is the same structure, --rename {old}=NAME if it is another one",
        )
    if unused := [name for name in same if name != "all" and name not in names]:
        raise UsageError(f"--same {unused[0]}: the data set has no such class", nearest(unused[0], names))


def _put_earlier(tasks: Sequence[dict[str, JsonValue]], names: Sequence[str], earlier: Mapping[str, Path]) -> None:
    """Say where the data of earlier tasks is."""
    if unknown := [name for name in earlier if name not in names]:
        raise UsageError(f"the run has no task '{unknown[0]}'", nearest(unknown[0], names))
    for name, folder in earlier.items():
        if not folder.expanduser().is_dir():
            raise UsageError(f"--earlier {name}={folder}: there is no such folder", "leave it out if the data is gone")
    for task, name in zip(tasks, names, strict=True):
        if name in earlier and isinstance(data := task["data"], dict):
            data["root"] = str(earlier[name].expanduser().absolute())


def give_up(run: RunFolder, working: Path | None = None) -> str:
    """Take a data set that was begun and not learned out of a run again; returns its name, empty if there is none.

    The run is then as it was sealed last. Working files and the state of the task are deleted.

    Args:
        run: The run.
        working: The folder for working files that was given, if any.

    Raises:
        RunError: Another process writes to the run, it has no sealed task, or is no run of data sets.
    """
    with run.locked():
        recipe, stream, sealed = run.recipe(), run.stream(), run.sealed()
        plan = recipe.stream
        if not isinstance(plan, DataSetsSection) or not sealed:
            raise RunError(f"{run.path} has no sealed data set to go back to", "delete the folder to begin anew")
        learned = len(sealed)
        if learned == len(plan.tasks) == len(stream.tasks):
            return ""
        name = label(plan.tasks[learned])
        WorkingFolder(run.path, working).clear()
        shutil.rmtree(run.resume, ignore_errors=True)
        drop_items(run.path / STORE, learned)
        for folder in (run.path / "tasks").iterdir():
            if folder not in sealed:
                shutil.rmtree(folder)
        tasks = stream.tasks[:learned]
        known = stream.model_copy(
            update={
                "tasks": tasks,
                "groups": stream.groups[:learned],
                "classes": stream.classes[: len(tasks[-1].seen)],
                "dataset": ", ".join(task.name for task in tasks),
            }
        )
        run.list_files((), dropped=BEGIN)
        write_stream(run.path / "stream.json", known)
        shorter = plan.model_copy(update={"tasks": plan.tasks[:learned]})
        dump_recipe(recipe.model_copy(update={"stream": shorter}), run.recipe_file)
        run.list_files(BEGIN)
    return name
