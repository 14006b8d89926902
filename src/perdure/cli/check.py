"""``perdure check``: a recipe before a run, or a data set on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
import yaml
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from perdure.config.load import load_recipe
from perdure.config.recipe import Recipe
from perdure.data.catalog import DATASETS, open_source
from perdure.data.check import Inspection, inspect
from perdure.data.source import SPLITS
from perdure.errors import UsageError
from perdure.streams.published import compare_counts
from perdure.streams.summary import list_sizes, summarize


def check(what: str, path: Path | None, overrides: Sequence[str], as_json: bool) -> None:
    """Check a data set if ``what`` names one (and no recipe), else a recipe; exit 1 if something is wrong."""
    if what in DATASETS:
        _check_dataset(what, path, _options(overrides), as_json)
    else:
        root = [f"data.root={path}"] if path is not None else []
        _check_recipe(load_recipe(what, [*overrides, *root]), as_json)


def _options(overrides: Sequence[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"'{text}' is not an option", "write --set key=value")
        options[key.removeprefix("data.")] = yaml.safe_load(value)
    return options


def _check_dataset(name: str, root: Path | None, options: dict[str, Any], as_json: bool) -> None:
    source = open_source(name, root, options)
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as bar:
        shown = bar.add_task("reading", total=None)
        found = inspect(source, SPLITS, advance=lambda: bar.advance(shown))
    if as_json:
        Console().print_json(json.dumps(found.to_dict()))
    else:
        _show_dataset(found, Console())
    if not found.ok:
        raise typer.Exit(1)


def _show_dataset(found: Inspection, console: Console) -> None:
    table = Table("split", "samples", "readable", "without any class", "smallest", "largest", title=found.dataset)
    for split, report in found.splits.items():
        sizes = ["×".join(map(str, shape)) or "–" for shape in (report.smallest, report.largest)]
        table.add_row(split, str(report.samples), str(report.readable), str(len(report.empty)), *sizes)
    console.print(table)
    counts = Table("id", "class", *(f"{s}: images / pixels" for s in found.splits))
    for class_id, name in found.classes.items():
        cells = [f"{r.images[class_id]:,} / {r.pixels[class_id]:,}" for r in found.splits.values()]
        counts.add_row(str(class_id), name, *cells)
    console.print(counts)
    for split, why in found.absent.items():
        console.print(f"[dim]no {split} split: {why}[/]", highlight=False)
    for problem in found.problems:
        console.print(f"[red]problem[/] {problem.split} {problem.name}: {problem.what}  [dim]{problem.hint}[/]", highlight=False)
    if found.hidden:
        console.print(f"[red]and {found.hidden} more[/]")
    console.print("[green]everything can be used[/]" if found.ok else "[red]not usable as it is[/]")


def _check_recipe(recipe: Recipe, as_json: bool) -> None:
    from perdure.config.build import build_stream, check_method

    check_method(recipe)
    source = open_source(recipe.data.name, recipe.data.root, recipe.data.settings)
    stream = build_stream(recipe, source)
    summary = summarize(stream)
    published = _published(recipe, list_sizes(stream))
    if as_json:
        Console().print_json(json.dumps({"recipe": recipe.name, **summary, "published": published}))
    else:
        _show_recipe(recipe, summary, published, Console())
    if any(not row["ok"] for row in published):
        raise typer.Exit(1)


def _published(recipe: Recipe, sizes: Any) -> list[dict[str, Any]]:
    if recipe.stream.order != "natural":
        return []
    split = f"{recipe.stream.base}-{recipe.stream.step}"
    return [row._asdict() for row in compare_counts(sizes, recipe.data.name, split, recipe.stream.setting)]


def _show_recipe(recipe: Recipe, summary: dict[str, Any], published: list[dict[str, Any]], console: Console) -> None:
    table = Table("task", "teaches", "train", "monitor", "test", title=f"{recipe.name}: {summary['protocol']}")
    for task in summary["tasks"]:
        images = [str(sum(v.values())) if v is not None else "–" for v in (task["images"][s] for s in ("train", "monitor", "test"))]
        table.add_row(task["name"], ", ".join(task["new"]), *images)
    console.print(table)
    for row in published:
        verdict = "[green]as published[/]" if row["ok"] else f"[red]published: {row['published']}[/]"
        console.print(f"task {row['step']} {row['split']}: {row['ours']} images, {verdict}", highlight=False)
    console.print("[green]the recipe can run[/]" if all(r["ok"] for r in published) else "[red]image counts differ from the published ones[/]")
