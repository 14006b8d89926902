"""``report.html``: one file, no network, everything about a run that a reader asks first."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

from perdure.files import write_text
from perdure.report import kept_items, sections
from perdure.report.confusion_tables import confusion_tables
from perdure.report.memorisation import TERMS, memorisation
from perdure.report.render import definitions, environment
from perdure.report.run_data import RunData, load_run
from perdure.report.sample_rows import sample_table
from perdure.report.words import explained, warning, words

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
    last = data.results.last
    shown = data.shown.get(max(data.ledgers, default=-1), ())
    columns, pictures = kept_items.picture_rows(data.stream, shown)
    distances = memorisation(data.stream, shown)
    return {
        "run": data,
        "stream": data.stream,
        "last": last,
        "last_name": None if last is None else data.stream.tasks[last].name,
        "cards": [] if last is None else sections.cards(data, last),
        "curves": sections.run_curves(data),
        "measured": [data.stream.tasks[t] for t in data.results.counts],
        "figures": sections.figure_table(data),
        "heat": [] if last is None else sections.heat_rows(data),
        "words": words(data.stream),
        "warning": warning(data.stream),
        "confusion": confusion_tables(data),
        "samples": sample_table(data),
        "columns": columns,
        "pictures": pictures,
        "what_they_are": kept_items.what_they_are(data.stream, shown),
        "distances": distances,
        "ledger": sections.ledger_table(data),
        "names": data.stream.names,
        "recipe": yaml.safe_dump(dict(data.recipe), sort_keys=False, allow_unicode=True),
        "definitions": definitions(explained(data.stream)),
        "terms": TERMS if distances else (),
    }
