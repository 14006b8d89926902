"""What ``perdure audit`` prints."""

from __future__ import annotations

import json
from typing import Final

from rich import markup
from rich.table import Table

from perdure.audit.findings import Audit
from perdure.cli.console import open_console
from perdure.errors import plain
from perdure.kept.ledger import sample_pictures

LIMITS: Final = (
    "A pass means: nothing is in the folder that recipe, ledgers and list of files do not explain. It does not mean "
    "that weights and statistics reveal nothing, nor that nobody rewrote files and ledgers together: only a signature "
    "shows that (docs/audit.md)."
)


def escape(text: str) -> str:
    """A text of a run folder as it may be printed: it commands neither the terminal nor rich."""
    return markup.escape(plain(text))


def show(found: Audit, as_json: bool) -> None:
    """Print the ledger and the findings."""
    console = open_console()
    if as_json:
        # in ASCII: names of files may hold what commands a terminal, or bytes that are no text
        console.print_json(json.dumps(found.to_json()), ensure_ascii=True)
        return
    table = Table("after task", "kept", "kind", "bytes", "bytes per class", "from images", title="Everything kept")
    pictures = [item for item in found.items if item["kind"] == "preview" and not (item["tensors"] or item["stored"])]
    for item in found.items:
        if item not in pictures:
            each, few = item["per_class_bytes"], item["from_images"]
            cells = escape(item["task"]), escape(item["name"]), escape(item["kind"])
            table.add_row(*cells, f"{item['bytes']:,}", f"{each:,}" if each else "–", str(few or "–"))
    if pictures:
        size = sum(item["bytes"] for item in pictures)
        table.add_row("all", "pictures", "preview", f"{size:,}", "–", "–")
    console.print(table)
    origin = pictures[0]["made_from"] if pictures else ""
    said = f"{sample_pictures((i['name'] for i in pictures), origin)} after each task" if pictures else ""
    for name, origin in dict.fromkeys(
        ("pictures", said or "one image each") if i in pictures else (i["name"], i["made_from"]) for i in found.items
    ):
        console.print(f"[bold]{escape(name)}[/]: {escape(origin)}", highlight=False)
    if any(item["kind"] == "exemplars" for item in found.items):
        console.print("[yellow]note[/] raw training samples (exemplars) are kept", highlight=False)
    if found.min_images is not None and any(item["from_images"] for item in found.items):
        text = f"patients: statistics that look like images come from at least {found.min_images} images of each class"
        console.print(text, highlight=False, soft_wrap=True)
    contents = Table("in the folder", "files", "bytes", title="Every byte of the run")
    for kind, (number, size) in sorted(found.files.items()):
        contents.add_row(escape(kind), f"{number:,}", f"{size:,}")
    contents.add_section()
    contents.add_row("all", *(f"{sum(pair[k] for pair in found.files.values()):,}" for k in (0, 1)))
    console.print(contents)
    for note in found.notes:
        console.print(f"[yellow]note[/] {escape(note)}", highlight=False, soft_wrap=True)
    for problem in found.problems:
        console.print(f"[red]problem[/] {escape(problem)}", highlight=False, soft_wrap=True)
    if found.signature_holds is not None:  # also where the audit fails: two questions, two answers
        console.print(
            "[green]the signature holds[/]" if found.signature_holds else "[red]the signature does not hold[/]"
        )
    if found.passed:
        console.print(f"[dim]{LIMITS}[/]", highlight=False, soft_wrap=True)
    console.print(
        "[green]audit passed[/]" if found.passed else f"[red]audit failed[/]: {len(found.problems)} problem(s)"
    )
