"""``perdure run``."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from perdure.config.load import load_recipe


def run(name: str, overrides: list[str], out: Path | None, resume: bool, quiet: bool) -> None:
    """Run a recipe and say where the report is."""
    recipe = load_recipe(name, overrides)
    folder = out or Path("runs") / f"{recipe.name.replace('/', '-')}-{recipe.method.name.rpartition(':')[2]}"

    from perdure.experiment import run_experiment

    run_experiment(recipe, folder, resume, quiet)
    console = Console(stderr=True, quiet=quiet)
    console.print(f"report: {folder / 'report.html'}", highlight=False, markup=False, soft_wrap=True)
