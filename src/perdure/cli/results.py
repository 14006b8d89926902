"""``perdure compare`` and ``perdure report``."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from perdure.run_folder import RunFolder


def compare(runs: list[Path], figures: list[str] | None, as_json: bool, html: Path | None) -> None:
    """Print a table of the runs' figures; write a page if asked for."""
    from perdure.report.compare import compare as put_side_by_side
    from perdure.report.compare import comparison_table
    from perdure.report.compare_page import write_comparison

    for path in runs:
        RunFolder.existing(path)
    comparison = put_side_by_side(runs, figures) if html is None else write_comparison(runs, html, figures)
    console = Console()
    if as_json:
        console.print_json(json.dumps(comparison.to_json()))
    else:
        console.print(comparison_table(comparison))
    if html is not None:
        Console(stderr=True).print(f"page: {html}", highlight=False, markup=False, soft_wrap=True)


def report(path: Path) -> None:
    """Write a run's report and model card again."""
    from perdure.report.page import write_model_card, write_report

    run = RunFolder.existing(path)
    write_model_card(run.path)
    page = write_report(run.path)
    Console(stderr=True).print(f"report: {page}", highlight=False, markup=False, soft_wrap=True)
