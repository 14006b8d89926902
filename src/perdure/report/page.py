"""``report.html``: one file, no network, everything about a run that a reader asks first."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

from perdure.files import write_text
from perdure.metrics.figures import headline
from perdure.report import sections
from perdure.report.render import definitions, environment
from perdure.report.run_data import RunData, load_run

REPORT: Final = "report.html"


def write_report(run: Path) -> Path:
    """Write ``report.html`` into a run folder, complete or only partly done; equal runs give equal bytes.

    Raises:
        RunError: The folder is not a run.
        DataError: A file of the run is damaged.
    """
    data = load_run(run)
    page = environment().get_template("report.html.j2").render(report_values(data))
    write_text(run / REPORT, page)
    return run / REPORT


def report_values(data: RunData) -> dict[str, Any]:
    """All that the template lays out."""
    last = data.evidence.last
    return {
        "run": data,
        "stream": data.stream,
        "last": last,
        "last_name": None if last is None else data.stream.tasks[last].name,
        "cards": [] if last is None else sections.cards(data, last),
        "curves": sections.run_curves(data),
        "measured": [data.stream.tasks[t] for t in data.evidence.counts],
        "figures": sections.figure_table(data),
        "heat": [] if last is None else sections.heat_rows(data),
        "samples": sections.sample_table(data),
        "ledger": sections.ledger_table(data),
        "names": data.stream.names,
        "recipe": yaml.safe_dump(dict(data.recipe), sort_keys=False, allow_unicode=True),
        "definitions": definitions([*headline(data.stream), "iou"]),
    }
