"""Check what `perdure demo` left behind: STAR remembers, and the pages open without a network."""

from __future__ import annotations

import csv
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

FIGURE = "miou.all[bg=in,absent=skip]"
MARGIN = 15.0
TASKS = 4
PAGES = ("compare.html", "star/report.html", "finetune/report.html", "joint/report.html")
FETCHED = frozenset({"src", "href", "xlink:href", "srcset", "data", "poster", "background", "action", "formaction"})
INSIDE = ("data:", "#")


def main(folder: Path) -> int:
    """Print one line a check; return 0 if all hold, else 1."""
    problems = [*remembers(folder), *(p for page in PAGES for p in self_contained(folder / page))]
    for problem in problems:
        print(f"failed: {problem}")
    return 1 if problems else 0


def remembers(folder: Path) -> list[str]:
    """Problems with the numbers: too few tasks, or STAR less than MARGIN points above fine-tuning at the end."""
    values = {method: figure_by_task(folder / method / "results.csv") for method in ("finetune", "star", "joint")}
    print(f"{FIGURE} after the last task: " + ", ".join(f"{m} {v[-1]:.1f}" for m, v in values.items() if v))
    problems = [f"{method}: no {FIGURE} in results.csv" for method, found in values.items() if not found]
    problems += [
        f"{method}: measured after {len(values[method])} tasks, not at least {TASKS}"
        for method in ("finetune", "star")
        if len(values[method]) < TASKS
    ]
    if not problems and values["star"][-1] < values["finetune"][-1] + MARGIN:
        problems.append(f"star is less than {MARGIN:g} points above finetune")
    return problems


def figure_by_task(path: Path) -> list[float]:
    """Values of FIGURE after each task, in order; empty if the file is missing."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["figure"] == FIGURE and not row["class_id"]]
    return [float(row["value"]) for row in sorted(rows, key=lambda row: int(row["after_task"]))]


def self_contained(page: Path) -> list[str]:
    """Problems of a page: missing, empty, or it fetches something that is not inside it."""
    if not page.is_file() or not page.stat().st_size:
        return [f"{page} is missing or empty"]
    text = page.read_text(encoding="utf-8")
    finder = _Fetches()
    finder.feed(text)
    styles = re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]?([^'\";]+)", text)
    fetched = finder.found + [first or second for first, second in styles]
    outside = [address for address in fetched if address and not address.strip().startswith(INSIDE)]
    return [f"{page} fetches {address[:80]}" for address in outside]


class _Fetches(HTMLParser):
    """Collects addresses that a browser fetches by itself; links that a reader may follow do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the addresses of one tag."""
        if tag != "a":
            self.found += [value for name, value in attrs if name in FETCHED and value]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: check_demo.py DEMO_FOLDER")
    sys.exit(main(Path(sys.argv[1])))
