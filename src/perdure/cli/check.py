"""``perdure check``: a recipe before a run, or a data set on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from perdure.cli.console import open_console
from perdure.config.recipe import Recipe
from perdure.data.catalog import open_source
from perdure.data.check import Inspection, inspect
from perdure.data.source import SPLITS
from perdure.labels import IGNORE
from perdure.streams.published import Comparison, compare_counts, datasets, published

if TYPE_CHECKING:
    from perdure.streams.summary import StreamSummary


def check_dataset(name: str, root: Path | None, options: Mapping[str, object], as_json: bool) -> bool:
    """Read a data set on disk and print what it holds; False if it cannot be used as it is."""
    source = open_source(name, root, options)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task("reading", total=None)
        found = inspect(source, SPLITS, advance=lambda: bar.advance(shown))
    if as_json:
        open_console().print_json(json.dumps(found.to_dict()))
    else:
        _show_dataset(found, open_console())
    return found.ok


def _show_dataset(found: Inspection, console: Console) -> None:
    whole = found.kind == "classification"  # one class an image: no pixels to count
    odd = "exact repeats" if whole else "without any class"
    table = Table("split", "samples", "readable", odd, "smallest", "largest", title=escape(found.dataset))
    for split, report in found.splits.items():
        sizes = ["×".join(map(str, shape)) or "–" for shape in (report.smallest, report.largest)]
        last = report.repeated if whole else len(report.empty)
        table.add_row(split, str(report.samples), str(report.readable), str(last), *sizes)
    console.print(table)
    counts = Table("id", "class", *(f"{s}: images" if whole else f"{s}: images / pixels" for s in found.splits))
    for class_id, name in found.classes.items():
        cells = [
            f"{r.images[class_id]:,}" if whole else f"{r.images[class_id]:,} / {r.pixels[class_id]:,}"
            for r in found.splits.values()
        ]
        counts.add_row("" if class_id == IGNORE else str(class_id), escape(name), *cells)  # its number is internal
    console.print(counts)
    for pair, count in found.shared.items():
        first, second = pair.split(", ")
        console.print(f"[yellow]{count} images of {second} are also in {first}, pixel for pixel[/]", highlight=False)
    for split, why in found.absent.items():
        console.print(f"[dim]no {split} split: {escape(why)}[/]", highlight=False)
    for problem in found.problems:
        place = " ".join(filter(None, (problem.split, problem.name)))
        text = f"[red]problem[/] {escape(f'{place}: {problem.what}')}  [dim]{escape(problem.hint)}[/]"
        console.print(text, highlight=False, soft_wrap=True)
    if found.hidden:
        console.print(f"[red]and {found.hidden} more[/]")
    console.print("[green]everything can be used[/]" if found.ok else "[red]not usable as it is[/]")


def check_recipe(recipe: Recipe, as_json: bool, allow_code: bool = False) -> bool:
    """Build everything that a recipe names and print the images of each task; False if published counts differ."""
    from perdure.config.build import (
        build_method,
        build_preparation,
        build_stream,
        build_tasks,
        check_kinds,
        check_method,
        refuse_foreign_code,
    )
    from perdure.streams.summary import list_sizes, summarize

    if not allow_code:
        refuse_foreign_code(recipe, f"recipe '{recipe.name}'")
    check_method(recipe)
    source = open_source(recipe.data.name, recipe.data.root, recipe.data.settings)
    check_kinds(recipe, source)
    summary = summarize(build_stream(recipe, source))
    # published counts hold where the data has the classes of the published data set in their order
    name, plan = recipe.data.name, recipe.stream
    beside: list[Comparison] = []
    if plan.order == "natural" and name in datasets() and len(source.space) == published(name)["classes"]:
        of_test = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"split": "test"})})
        sizes = list_sizes(build_tasks(of_test, source))  # published are the numbers of test images
        beside = compare_counts(sizes, name, f"{plan.base}-{plan.step}", plan.setting)
    fetched = recipe.network.settings.get("weights") == "imagenet"  # a check fetches nothing
    build_method(recipe, build_preparation(recipe, source.kind), pretrained=not fetched)
    if as_json:
        rows = [row._asdict() for row in beside]
        open_console().print_json(json.dumps({"recipe": recipe.name, **summary, "published": rows}))
    else:
        _show_recipe(recipe, summary, beside, open_console())
    return all(row.ok for row in beside)


def _show_recipe(recipe: Recipe, summary: StreamSummary, beside: Sequence[Comparison], console: Console) -> None:
    measured = "test" if recipe.evaluate.split == "test" else "measured (validation)"
    table = Table(
        "task", "teaches", "train", "validation", measured, title=escape(f"{recipe.name}: {summary['protocol']}")
    )
    for task in summary["tasks"]:
        images = [
            str(sum(v.values())) if v is not None else "–"
            for v in (task["images"][s] for s in ("train", "validation", "test"))
        ]
        table.add_row(escape(task["name"]), escape(", ".join(task["new"])), *images)
    console.print(table)
    for row in beside:
        verdict = "[green]as published[/]" if row.ok else f"[red]published: {row.published}[/]"
        console.print(f"task {row.step + 1} {row.split}: {row.ours} images, {verdict}", highlight=False)
    passed = all(row.ok for row in beside)
    console.print("[green]the recipe can run[/]" if passed else "[red]image counts differ from the published ones[/]")
