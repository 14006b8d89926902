"""Write a results page (Markdown) from finished runs: the table, and the commands that made it.

python scripts/results_page.py TITLE PAGE RUN... --command "perdure run …" [--command …] [--note TEXT …]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from perdure.files import write_text
from perdure.report.compare import Comparison, Entry, compare


def page(
    title: str, comparison: Comparison, commands: list[str], notes: list[str], environment: dict[str, object]
) -> str:
    """Text of the page."""
    names = [entry.label for entry in comparison.entries]
    lines = [
        f"# {title}",
        "",
        f"{comparison.dataset}, {comparison.protocol}, after task {comparison.after + 1} of {comparison.tasks}.",
        "",
    ]
    lines += ["| figure | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for figure in comparison.figures:
        cells = [_cell(entry, figure) for entry in comparison.entries]
        lines.append(f"| `{figure}` | " + " | ".join(cells) + " |")
    kept = ["–" if e.kept_bytes is None else f"{e.kept_bytes:,}" for e in comparison.entries]
    lines.append("| bytes kept besides weights | " + " | ".join(kept) + " |")
    lines += ["", "Made with", "", "```sh", *commands, "```", ""]
    lines += [*(f"- {note}" for note in notes), ""] if notes else []
    versions = ", ".join(f"{k} {environment[k]}" for k in ("perdure", "torch", "timm", "python"))
    lines += [f"Environment: {versions}; {environment['threads']} CPU thread(s), no GPU.", ""]
    return "\n".join(lines)


def _cell(entry: Entry, figure: str) -> str:
    score = entry.scores.get(figure)
    if score is None or score.mean is None:
        return "–"
    return f"{score.mean:.1f}" if score.sd is None else f"{score.mean:.1f} ± {score.sd:.1f}"


def main() -> None:
    """Parse the arguments and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("title")
    parser.add_argument("page", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--command", action="append", default=[])
    parser.add_argument("--note", action="append", default=[])
    parser.add_argument("--figure", action="append")
    asked = parser.parse_args()
    environment = json.loads((asked.runs[0] / "environment.json").read_text(encoding="utf-8"))
    text = page(asked.title, compare(asked.runs, asked.figure), asked.command, asked.note, environment)
    write_text(asked.page, text)


if __name__ == "__main__":
    main()
