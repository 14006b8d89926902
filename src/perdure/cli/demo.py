"""``perdure demo``: the main job on built-in data."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Final

from rich.console import Console

from perdure.config.load import load_recipe
from perdure.errors import RunError
from perdure.files import write_json

METHODS: Final = ("finetune", "star", "joint")


def demo(out: Path, fresh: bool) -> None:
    """Run the demo recipe with a lower bound, STAR and an upper bound, and compare them on one page."""
    console = Console(stderr=True)
    folders = [out / method for method in METHODS]
    if fresh:
        _clear(folders)
    from perdure.experiment import run_experiment
    from perdure.report.compare import comparison_table
    from perdure.report.compare_page import write_comparison

    started = time.monotonic()
    for method, folder in zip(METHODS, folders, strict=True):
        recipe = load_recipe("demo", [f"method={method}"])
        run_experiment(recipe, folder, resume=True)
    comparison = write_comparison(folders, out / "compare.html")
    write_json(out / "compare.json", comparison.to_json())
    Console().print(comparison_table(comparison))
    console.print(
        f"{time.monotonic() - started:.0f} s. Pages to look at: {out / 'compare.html'}, {folders[1] / 'report.html'}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _clear(folders: list[Path]) -> None:
    for folder in folders:
        if folder.exists() and not (folder / "recipe.yaml").is_file():
            raise RunError(f"{folder} is not a run folder and will not be deleted", "choose another --out")
        shutil.rmtree(folder, ignore_errors=True)
