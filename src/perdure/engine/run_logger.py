"""What a run reports while it works: progress bars and log.jsonl."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from perdure.engine.machine import Machine
from perdure.engine.state import State
from perdure.files import write_failure

_TAIL_BYTES = 1 << 16
EVENTS: Final = frozenset({"sealed", "collected", "generated", "validation"})
"""What a line may say that happened; the audit takes any other for something that does not belong in a log."""


class Show(Protocol):
    """Moves a progress bar."""

    def __call__(self, done: int, note: str | None = None) -> None:
        """Set the number of finished steps and, if given, the note behind the bar, which stays until the next one."""


class RunLogger:
    """Shows progress on a terminal and appends one JSON line per interval to ``log.jsonl`` (main process only).

    Attributes:
        last_step: Last line about training that an earlier process of this run wrote, if any.
    """

    def __init__(self, machine: Machine, path: Path | None = None, quiet: bool = False) -> None:
        self.machine, self.path = machine, path
        self.console = Console(stderr=True, quiet=quiet or not machine.main)
        lines = _earlier_lines(path) if path is not None and machine.main else []
        earlier = max((line.get("seconds", 0.0) for line in lines), default=0.0)
        self._started = time.monotonic() - earlier
        self.last_step = next((line for line in reversed(lines) if "run_step" in line), None)

    def log(self, **values: object) -> None:
        """Append a line with the seconds that the run has worked and the given values.

        Raises:
            PerdureError: The disk is full.
        """
        if self.path is None or not self.machine.main:
            return
        line = json.dumps(
            {"seconds": round(time.monotonic() - self._started, 3), **values}, allow_nan=False, default=str
        )
        try:  # opened for each line, so that every line is there when a process is killed
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
        except OSError as error:
            raise write_failure(self.path, error) from error

    def say(self, text: str) -> None:
        """Print one line for people (rich markup)."""
        self.console.print(text, highlight=False)

    @contextmanager
    def progress(self, title: str, total: int, done: int = 0) -> Iterator[Show]:
        """Progress bar of a phase: title, steps, time left, latest loss. Gives the function that moves it."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
        )
        hidden = self.console.quiet or not self.console.is_terminal  # a log file needs no moving bars
        with Progress(*columns, console=self.console, transient=True, disable=hidden) as bar:
            bar_task = bar.add_task(title, total=total, completed=done, note="")

            def show(done: int, note: str | None = None) -> None:
                bar.update(bar_task, completed=done)
                if note is not None:
                    bar.update(bar_task, note=note)

            yield show


def _earlier_lines(path: Path) -> list[State]:
    """Last lines that earlier processes wrote; a line that a kill cut short is taken off the file."""
    if not path.exists():
        return []
    try:
        with path.open("r+b") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _TAIL_BYTES))
            tail = stream.read()
            whole, cut = tail[: tail.rfind(b"\n") + 1], tail[tail.rfind(b"\n") + 1 :]
            if cut:
                stream.truncate(size - len(cut))
    except OSError as error:
        raise write_failure(path, error) from error
    lines: list[State] = []
    for text in whole.splitlines():
        with contextlib.suppress(ValueError):  # the first one may have lost its beginning
            line = json.loads(text)
            lines += [line] if isinstance(line, dict) else []
    return lines
