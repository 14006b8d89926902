"""``perdure demo``: the built-in recipe with several methods, side by side."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Final

from perdure.cli.console import open_console
from perdure.config.load import load_recipe
from perdure.errors import RunError
from perdure.files import write_json

DEMO: Final = ("finetune", "star", "joint")
DEMO_VOLUMES: Final = ("finetune", "lwf")
"""No joint: to learn three sets of volumes, each labelled in part, takes it longer than both."""


def demo(out: Path | None, fresh: bool, volumes: bool) -> str:
    """Run the demo into ``out``, compare its methods, and say which pages to look at.

    Raises:
        RunError: A folder that would be deleted for a ``fresh`` start is no run folder.
    """
    recipe, methods = ("demo-volumes", DEMO_VOLUMES) if volumes else ("demo", DEMO)
    top = out or Path(recipe)
    folders = [top / method for method in methods]
    for folder in folders if fresh else ():
        # nothing is deleted that a run did not write, whatever --out points at
        if folder.exists() and not (folder / "recipe.yaml").is_file():
            raise RunError(f"{folder} is not a run folder and will not be deleted", "choose another --out")
        shutil.rmtree(folder, ignore_errors=True)

    from perdure.experiment import run_experiment
    from perdure.report.compare import comparison_table
    from perdure.report.compare_page import write_comparison

    started = time.monotonic()
    for method, folder in zip(methods, folders, strict=True):
        run_experiment(load_recipe(recipe, [f"method={method}"]), folder, resume=True)  # a second call costs nothing
    comparison = write_comparison(folders, top / "compare.html")
    write_json(top / "compare.json", comparison.to_json())
    open_console().print(comparison_table(comparison))
    pages = f"{top / 'compare.html'}, {folders[1] / 'report.html'}"
    return f"{time.monotonic() - started:.0f} s. Pages to look at: {pages}"
