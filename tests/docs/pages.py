"""What the tests of the docs share: the pages, their blocks, and the commands in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LAUNCHERS = (
    re.compile(r"(?:\.venv/bin/)?perdure\s"),
    re.compile(r"python -m perdure\s"),
    re.compile(r"accelerate launch (?:--\w+ \S+ )*-m perdure\s"),
)


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    language: str
    text: str


class Command(NamedTuple):
    """A perdure command of a page: the verb and what follows."""

    page: str
    line: str
    words: list[str]

    @property
    def verb(self) -> str:
        return self.words[0]


def name(page: Path) -> str:
    """A page's place in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(language: str = "") -> list[Block]:
    """Fenced blocks of all pages, of one language if given."""
    found = [
        Block(name(page), match[1], match[2])
        for page in PAGES
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    ]
    return [block for block in found if not language or block.language == language]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def inline(page: Path) -> list[str]:
    """Code within the text of a page."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def shell_lines() -> list[tuple[str, str]]:
    """Page and line of every line of the shell blocks."""
    return [(block.page, line.strip()) for block in blocks("sh") for line in block.text.splitlines() if line.strip()]


def commands() -> list[Command]:
    """Every perdure command in a shell block, and in the header of an example recipe."""
    lines = shell_lines()
    for recipe in sorted((ROOT / "examples").glob("*.yaml")):
        header = re.findall(r"^# +(perdure .+)$", recipe.read_text(encoding="utf-8"), re.MULTILINE)
        lines += [(name(recipe), line) for line in header]
    found: list[Command] = []
    for page, line in lines:
        launcher = next((match for pattern in LAUNCHERS if (match := pattern.match(line))), None)
        if launcher is not None:
            found.append(Command(page, line, shlex.split(line[launcher.end() :], comments=True)))
    return found
