"""``perdure list``: tables only, nothing heavy is imported."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from perdure.errors import UsageError, nearest


def list_things(what: str, as_json: bool) -> None:
    """Print one of the lists."""
    lists = {
        "recipes": _recipes,
        "methods": _methods,
        "datasets": _datasets,
        "networks": _networks,
        "metrics": _metrics,
    }
    if what not in lists:
        raise UsageError(f"there is no list '{what}'", nearest(what, lists))
    rows = lists[what]()
    console = Console()
    if as_json:
        console.print_json(json.dumps(rows))
        return
    shown = [_short(row) for row in rows] if what == "metrics" else rows
    table = Table(title=what)
    for number, header in enumerate(shown[0]):
        table.add_column(header, no_wrap=number == 0, overflow="fold")
    for row in shown:
        table.add_row(*(escape(str(v)) for v in row.values()))
    console.print(table)


def _short(metric: dict[str, Any]) -> dict[str, Any]:
    return {"figure": metric["default"], "unit": metric["unit"], "meaning": metric["meaning"]}


def _recipes() -> list[dict[str, Any]]:
    from perdure.config.load import read_raw, shipped

    return [
        {"recipe": name, "method": _name(raw["method"]), "data": _name(raw["data"]), "about": raw.get("about", "")}
        for name in shipped()
        for raw in (read_raw(name),)
    ]


def _name(section: Any) -> str:
    return section if isinstance(section, str) else str(section["name"])


def _methods() -> list[dict[str, Any]]:
    from perdure.methods import METHODS

    return [{"method": name, "what it does": e.summary, "source": e.source} for name, e in METHODS.items()]


def _datasets() -> list[dict[str, Any]]:
    from perdure.data.catalog import DATASETS

    return [
        {"data set": name, "what it is": e.summary, "layout": e.layout, "notes": e.notes}
        for name, e in DATASETS.items()
    ]


def _networks() -> list[dict[str, Any]]:
    from perdure.networks.build import NETWORKS

    return [{"network": name, "what it is": e.summary, "source": e.source} for name, e in NETWORKS.items()]


def _metrics() -> list[dict[str, Any]]:
    from perdure.metrics.definitions import describe

    return describe()
