"""``perdure list``: tables only, nothing heavy is imported."""

from __future__ import annotations

import json
from collections.abc import Mapping

from rich.markup import escape
from rich.table import Table

from perdure.cli.console import open_console
from perdure.config.load import load_recipe, shipped
from perdure.data.catalog import DATASETS
from perdure.errors import UsageError, nearest
from perdure.methods import METHODS
from perdure.metrics.definitions import describe
from perdure.networks.build import NETWORKS

LISTS = ("recipes", "methods", "datasets", "networks", "metrics")


def list_things(what: str, as_json: bool) -> None:
    """Print one of the lists; metrics as JSON have all parts of their definitions."""
    if what not in LISTS:
        raise UsageError(f"there is no list '{what}'", nearest(what, LISTS))
    if as_json and what == "metrics":
        open_console().print_json(json.dumps(describe()))
        return
    rows: list[Mapping[str, object]]
    if what == "recipes":
        rows = []
        for recipe in shipped():
            made = load_recipe(recipe)
            rows.append(
                {
                    "recipe": recipe,
                    "method": made.method.name,
                    "data": ", ".join(dict.fromkeys(s.name for s in made.sets)),
                    "about": made.about,
                }
            )
    elif what == "methods":
        rows = [{"method": name, "what it does": e.summary, "source": e.source} for name, e in METHODS.items()]
    elif what == "datasets":
        rows = [
            {"data set": name, "what it is": e.summary, "layout": e.layout, "notes": e.notes}
            for name, e in DATASETS.items()
        ]
    elif what == "networks":
        rows = [{"network": name, "what it is": e.summary, "source": e.source} for name, e in NETWORKS.items()]
    else:
        rows = [
            {"figure": m["default"], "one value per": m["per"], "unit": m["unit"], "meaning": m["meaning"]}
            for m in describe()
        ]
    if as_json:
        open_console().print_json(json.dumps(rows))
        return
    table = Table(title=what)
    for number, header in enumerate(rows[0]):
        table.add_column(header, no_wrap=number == 0, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(v)) for v in row.values()))
    open_console().print(table)
