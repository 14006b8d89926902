"""``MODEL_CARD.md``: what the model is, which tasks made it, how good it is, what it keeps, what it is not for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from perdure.files import write_text
from perdure.report import sections
from perdure.report.render import definitions, environment
from perdure.report.run_data import RunData, load_run
from perdure.report.words import explained, warning, words

CARD: Final = "MODEL_CARD.md"


def write_model_card(run: Path) -> Path:
    """Write ``MODEL_CARD.md`` into a run folder, complete or only partly done.

    Raises:
        RunError: The folder is not a run.
        DataError: A file of the run is damaged.
    """
    data = load_run(run)
    text = environment().get_template("model_card.md.j2").render(card_values(data))
    write_text(run / CARD, text)
    return run / CARD


def card_values(data: RunData) -> dict[str, Any]:
    """All that the card's template lays out."""
    section = data.recipe.get("data")
    about = section if isinstance(section, dict) else {}
    last = data.results.last
    return {
        "run": data,
        "stream": data.stream,
        "names": data.stream.names,
        "last": last,
        "measured": [data.stream.tasks[t] for t in data.results.counts],
        "figures": sections.figure_table(data),
        "heat": [] if last is None else sections.heat_rows(data),
        "ledger": sections.ledger_table(data),
        "definitions": definitions(explained(data.stream)),
        "words": words(data.stream),
        "warning": warning(data.stream),
        "licence": about.get("licence") or about.get("license"),
        "notes": about.get("notes"),
        "about": data.recipe.get("about") or "",
        "version": data.environment.get("perdure"),
    }
