"""``perdure check``: a recipe before a run, or a data set on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from perdure.config.load import load_recipe, split_override
from perdure.config.recipe import Recipe
from perdure.data.catalog import DATASETS, open_source
from perdure.data.check import Inspection, inspect
from perdure.data.source import SPLITS, Source
from perdure.streams.published import compare_counts, datasets, published


def check(what: str, path: Path | None, overrides: Sequence[str], as_json: bool) -> None:
    """Check a data set if ``what`` names one (and no recipe), else a recipe; exit 1 if something is wrong."""
    if what in DATASETS:
        _check_dataset(what, path, _options(overrides), as_json)
    else:
        root = [f"data.root={path}"] if path is not None else []
        _check_recipe(load_recipe(what, [*overrides, *root]), as_json)


def _options(overrides: Sequence[str]) -> dict[str, Any]:
    pairs = map(split_override, overrides)
    return {key.removeprefix("data."): value for key, value in pairs}


def _check_dataset(name: str, root: Path | None, options: dict[str, Any], as_json: bool) -> None:
    source = open_source(name, root, options)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task("reading", total=None)
        found = inspect(source, SPLITS, advance=lambda: bar.advance(shown))
    if as_json:
        Console().print_json(json.dumps(found.to_dict()))
    else:
        _show_dataset(found, Console())
    if not found.ok:
        raise typer.Exit(1)


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
        counts.add_row(str(class_id), escape(name), *cells)
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


def _check_recipe(recipe: Recipe, as_json: bool) -> None:
    from perdure.config.build import (
        build_method,
        build_preparation,
        build_stream,
        build_tasks,
        check_kinds,
        check_method,
    )
    from perdure.streams.summary import list_sizes, summarize

    check_method(recipe)
    source = open_source(recipe.data.name, recipe.data.root, recipe.data.settings)
    check_kinds(recipe, source)
    summary = summarize(build_stream(recipe, source))
    beside = _published(recipe, source, list_sizes(build_tasks(recipe, source)))
    fetched = recipe.network.settings.get("weights") == "imagenet"  # a check fetches nothing
    build_method(recipe, build_preparation(recipe, source.kind), pretrained=not fetched)
    if as_json:
        Console().print_json(json.dumps({"recipe": recipe.name, **summary, "published": beside}))
    else:
        _show_recipe(recipe, summary, beside, Console())
    if any(not row["ok"] for row in beside):
        raise typer.Exit(1)


def _published(recipe: Recipe, source: Source, sizes: Mapping[str, Sequence[int] | None]) -> list[dict[str, Any]]:
    """Image counts beside the published ones, where the data has the classes of the published data set."""
    name, plan = recipe.data.name, recipe.stream
    if plan.order != "natural" or name not in datasets() or len(source.space) != published(name)["classes"]:
        return []
    return [row._asdict() for row in compare_counts(sizes, name, f"{plan.base}-{plan.step}", plan.setting)]


def _show_recipe(recipe: Recipe, summary: dict[str, Any], published: list[dict[str, Any]], console: Console) -> None:
    table = Table(
        "task", "teaches", "train", "validation", "test", title=escape(f"{recipe.name}: {summary['protocol']}")
    )
    for task in summary["tasks"]:
        images = [
            str(sum(v.values())) if v is not None else "–"
            for v in (task["images"][s] for s in ("train", "validation", "test"))
        ]
        table.add_row(escape(task["name"]), escape(", ".join(task["new"])), *images)
    console.print(table)
    for row in published:
        verdict = "[green]as published[/]" if row["ok"] else f"[red]published: {row['published']}[/]"
        console.print(f"task {row['step']} {row['split']}: {row['ours']} images, {verdict}", highlight=False)
    console.print(
        "[green]the recipe can run[/]"
        if all(r["ok"] for r in published)
        else "[red]image counts differ from the published ones[/]"
    )
