"""What ``perdure audit`` prints."""

from __future__ import annotations

import json

from rich.markup import escape
from rich.table import Table

from perdure.cli.console import open_console
from perdure.kept.audit import Audit


def show(found: Audit, as_json: bool) -> None:
    """Print the ledger and the findings."""
    console = open_console()
    if as_json:
        console.print_json(json.dumps(found.to_json()))
        return
    table = Table("after task", "kept", "kind", "bytes", "bytes per class", title="Everything kept")
    pictures = [item for item in found.items if item["kind"] == "preview" and not (item["tensors"] or item["stored"])]
    for item in found.items:
        if item not in pictures:
            each = item["per_class_bytes"]
            cells = escape(item["task"]), escape(item["name"]), item["kind"]
            table.add_row(*cells, f"{item['bytes']:,}", f"{each:,}" if each else "–")
    if pictures:
        size = sum(item["bytes"] for item in pictures)
        table.add_row("all", f"{len(pictures)} pictures", "preview", f"{size:,}", "–")
    console.print(table)
    for name, origin in dict.fromkeys(
        ("pictures" if i in pictures else i["name"], i["made_from"]) for i in found.items
    ):
        console.print(f"[bold]{escape(name)}[/]: {escape(origin)}", highlight=False)
    if any(item["kind"] == "exemplars" for item in found.items):
        console.print("[yellow]note[/] raw training samples (exemplars) are kept", highlight=False)
    for problem in found.problems:
        console.print(f"[red]problem[/] {escape(problem)}", highlight=False, soft_wrap=True)
    console.print(
        "[green]audit passed[/]" if found.passed else f"[red]audit failed[/]: {len(found.problems)} problem(s)"
    )
