"""The console that verbs print to."""

from __future__ import annotations

from typing import Final

from rich.console import Console

WIDEST: Final = 1 << 14
"""Columns where no terminal limits them: no table of ours is wider."""


def open_console(stderr: bool = False) -> Console:
    """Console as wide as its terminal, or as its widest line where the output is a file or a pipe.

    rich takes 80 columns for granted there, and cuts names and figures that a program or a person looks for.
    """
    console = Console(stderr=stderr)
    if not console.is_terminal:
        console.width = WIDEST
    return console
