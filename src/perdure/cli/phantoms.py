"""``perdure phantoms``: built-in data as files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from perdure.errors import UsageError, nearest

KINDS: Final = ("torso", "slices")


def write(what: str, out: Path, options: Mapping[str, int | None]) -> list[Path]:
    """Write the folders of a kind with a progress bar; returns them."""
    if what not in KINDS:
        raise UsageError(f"there are no phantoms '{what}'", nearest(what, KINDS))

    from rich.progress import Progress

    from perdure.cli.console import open_console
    from perdure.data.phantoms.raw_folders import write_raw_folders

    console = open_console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:

        def begin(total: int) -> Callable[[], None]:
            shown = bar.add_task("cases", total=total)
            return lambda: bar.advance(shown)

        return write_raw_folders(what, out, options, begin)
